"""Whether a model fits on given GPUs, and how fast it could be there: arithmetic over `ModelConfig`, nothing loaded.

Bytes are counted from shapes; times are rooflines (bytes over bandwidth, operations over peak), so a floor
that no engine beats, not a promise. Every assumption behind a figure is in `Plan.assumptions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

from grok_engine.checkpoint.base import Checkpoint, total_bytes
from grok_engine.checkpoint.gguf.files import gguf_file
from grok_engine.checkpoint.hf.files import is_hf_folder
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.packed import is_packed_folder
from grok_engine.checkpoint.xai.layout import GROUPS, layout, release_groups
from grok_engine.config import ConfigError, ModelConfig
from grok_engine.loading.build import HeldMatrices, held_matrices
from grok_engine.models.families import PRESETS
from grok_kernels.chips import GPUS, Gpu

PlanWeights = Literal["int8", "fp8", "bf16"]
PlanKV = Literal["bf16", "fp8"]

RESERVED = 0.10  # the CUDA context, communication buffers, captured graphs, fragmentation: what servers leave free
CHUNK = 2048  # tokens of prompt in one step
NODE_GPUS = 8
NETWORK = 50e9  # bytes/s a GPU between nodes: one 400 Gb/s adapter each
START_S = 5e-6  # before a collective's first byte arrives


@dataclass(frozen=True, slots=True)
class Cost:
    """What one GPU reads and computes. `matrix_ops` run at the weights' peak, `bf16_ops` at bf16's."""

    read_bytes: float = 0.0
    matrix_ops: float = 0.0
    bf16_ops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read_bytes + other.read_bytes, self.matrix_ops + other.matrix_ops, self.bf16_ops + other.bf16_ops
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(self.read_bytes * times, self.matrix_ops * times, self.bf16_ops * times)

    def floor(self, *, bandwidth: float, peak: float, bf16: float) -> tuple[float, float]:
        """Seconds for the bytes, and for the operations; the larger is the roofline."""
        return self.read_bytes / bandwidth, self.matrix_ops / peak + self.bf16_ops / bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds, summed over steps; `total_s` adds up max(memory, compute) + link of each."""

    memory_s: float
    compute_s: float
    link_s: float
    total_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes are per GPU unless named otherwise. `headroom_bytes` is what stays free, below 0 what is missing;
    `min_gpus` None means that no valid count of this GPU holds it."""

    model: str
    chip: str
    gpus: int
    weights: PlanWeights
    head: PlanWeights
    kv: PlanKV
    context: int
    batch: int
    params_total: int
    params_active: int
    released_bytes: int | None
    memory_bytes: int
    usable_bytes: int
    weight_bytes: int
    workspace_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int  # of the whole model, one copy
    kv_bytes_per_token_gpu: int
    kv_tokens_per_request: int
    fits: bool
    headroom_bytes: int
    kv_capacity_tokens: int
    max_requests: int
    valid_gpus: tuple[int, ...]
    min_gpus: int | None
    decode: StepTime
    prefill: StepTime
    assumptions: tuple[str, ...]
    stored_bytes: int | None  # of all tensors of the checkpoint, where there is one
    on_cpu: HeldMatrices | None  # what loading makes of its matrices

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Bytes of one GPU's share of the whole model, split by when a step reads them."""

    experts: int
    layers: int  # everything else in the layers: read by every step
    embedding: int
    head: int  # 0 where the embedding serves

    @property
    def total(self) -> int:
        return self.experts + self.layers + self.embedding + self.head


def _kv_heads(c: ModelConfig, gpus: int) -> int:
    return max(1, c.num_kv_heads // gpus)


def _weights(c: ModelConfig, weights: PlanWeights, n: int, head: PlanWeights = "bf16") -> _Weights:
    d, hc, gc = c.d_model, c.num_heads * c.head_dim // n, _kv_heads(c, n) * c.head_dim

    def matrix(rows_in: int, out: int, groups: int, format: PlanWeights = weights) -> int:
        scales = {"int8": groups * out, "fp8": out, "bf16": 0}[format]
        return (2 if format == "bf16" else 1) * rows_in * out + 4 * scales

    split_groups = -(-GROUPS // n)  # where the input rows are sharded, so are their groups of scales
    experts = c.num_experts * (matrix(d, 2 * c.d_ff // n, 1) + matrix(c.d_ff // n, d, split_groups))
    layer = matrix(d, hc + 2 * gc, 1) + matrix(hc, d, split_groups)
    if c.dense_d_ff:
        layer += matrix(d, 2 * c.dense_d_ff // n, 1) + matrix(c.dense_d_ff // n, d, split_groups)
    layer += 4 * d * ((4 if c.post_norms else 2) + c.num_experts)
    vocab = -(-c.vocab_size // n)
    own_head = 0 if c.tie_embeddings and head == "bf16" else matrix(d, vocab, 1, head)
    return _Weights(c.num_layers * experts, c.num_layers * layer + 4 * d, 2 * d * vocab, own_head)


def kv_bytes_per_token(c: ModelConfig, kv: PlanKV, heads: int) -> int:
    """Keys and values of one token in all layers, `heads` of each."""
    return 2 * c.num_layers * heads * (2 * c.head_dim if kv == "bf16" else c.head_dim + 4)


def cached_tokens(c: ModelConfig, tokens: int) -> int:
    """Tokens of a request whose keys and values are kept."""
    return min(tokens, c.sliding_window) if c.sliding_window else tokens


def _workspace(c: ModelConfig, n: int, context: int, batch: int) -> int:
    tokens = max(batch, min(CHUNK, context))
    hc, gc = c.num_heads * c.head_dim // n, _kv_heads(c, n) * c.head_dim
    wide = 4 * c.d_model + 2 * hc + 2 * gc + 3 * c.dense_d_ff // n
    wide += c.num_experts_per_tok * (3 * c.d_ff // n + 2 * c.d_model)
    return 2 * tokens * wide + 2 * 4 * batch * c.vocab_size


def expert_layer_cost(c: ModelConfig, tokens: int, weights: PlanWeights, gpus: int = 1) -> Cost:
    """One expert layer on each of `gpus`: the experts' weights that even routing activates, and the products."""
    if not c.num_experts:
        return Cost()
    hit = 1 - (1 - c.num_experts_per_tok / c.num_experts) ** tokens
    ops = 6 * tokens * c.num_experts_per_tok * c.d_model * c.d_ff / gpus
    return Cost(_weights(c, weights, gpus).experts / c.num_layers * hit, ops)


def _step_cost(
    c: ModelConfig, weights: PlanWeights, head: PlanWeights, kv: PlanKV, n: int, *, tokens: int, cached: int,
    pairs: int, rows: int,
) -> Cost:  # fmt: skip
    """One step on each GPU: `cached` tokens of KV read, `pairs` of query and key scored, `rows` of logits."""
    w, d = _weights(c, weights, n, head), c.d_model
    hc, gc = c.num_heads * c.head_dim // n, _kv_heads(c, n) * c.head_dim
    read = w.layers + (w.head or w.embedding) + 2 * tokens * d
    read += cached * kv_bytes_per_token(c, kv, _kv_heads(c, n))
    linear = 2 * tokens * d * (2 * hc + 2 * gc + 3 * c.dense_d_ff // n) * c.num_layers
    bf16 = 4 * pairs * hc * c.num_layers + 2 * rows * d * -(-c.vocab_size // n)
    bf16 += 2 * tokens * d * c.num_experts * c.num_layers
    return Cost(read, linear, bf16) + expert_layer_cost(c, tokens, weights, n) * c.num_layers


def _link_rate(chip: Gpu, n: int) -> float:
    return chip.link if n <= NODE_GPUS else min(chip.link, NETWORK)


def _link_s(c: ModelConfig, chip: Gpu, n: int, tokens: int, rows: int) -> float:
    if n == 1:
        return 0.0
    sent = 2 * c.num_layers * 2 * 2 * tokens * c.d_model + 4 * rows * c.vocab_size
    return sent * (n - 1) / n / _link_rate(chip, n) + (2 * c.num_layers + 1) * START_S


def _time(steps: Iterator[tuple[Cost, float]], chip: Gpu, weights: PlanWeights, tokens: int) -> StepTime:
    memory = compute = link = total = 0.0
    for cost, link_s in steps:
        memory_s, compute_s = cost.floor(bandwidth=chip.bandwidth, peak=chip.peak(weights), bf16=chip.bf16)
        memory, compute, link = memory + memory_s, compute + compute_s, link + link_s
        total += max(memory_s, compute_s) + link_s
    return StepTime(memory_s=memory, compute_s=compute, link_s=link, total_s=total, tokens_per_s=tokens / total)


def _prefill_steps(
    c: ModelConfig, chip: Gpu, weights: PlanWeights, head: PlanWeights, kv: PlanKV, n: int, context: int
) -> Iterator[tuple[Cost, float]]:
    for start in range(0, context, CHUNK):
        end = min(start + CHUNK, context)
        # keys seen by each query: its position + 1, or the window once that is full
        full = max(start, min(end, cached_tokens(c, context)))
        pairs = (start + 1 + full) * (full - start) // 2 + (end - full) * cached_tokens(c, context)
        cached = end - start + cached_tokens(c, start)
        cost = _step_cost(c, weights, head, kv, n, tokens=end - start, cached=cached, pairs=pairs, rows=1)
        yield cost, _link_s(c, chip, n, end - start, 1)


def released_bytes(c: ModelConfig) -> int | None:
    """The tensors of the published checkpoint of this architecture; None where none was published.

    Grok-1's: int8 matrices, bf16 scales, fp32 embedding, router and norms. Each of its 770 files adds about
    250 bytes of header. The other families were published in bf16.
    """
    known = next((p for p in PRESETS.values() if replace(c, name=p.name) == p), None)
    if known is None or known.name == "grok-0":
        return None
    if known.name != "grok-1":
        return 2 * c.param_count()
    return sum(
        prod(s.shape) + 2 * prod(s.scales_shape(release_groups(s.name))) if s.quantizable else 4 * prod(s.shape)
        for s in layout(c)
    )


def valid_gpu_counts(c: ModelConfig) -> tuple[int, ...]:
    """Counts that divide the heads and the feed-forward widths, and share the kv heads evenly."""
    whole = [w for w in (c.num_heads, c.d_ff, c.dense_d_ff) if w]
    return tuple(
        n
        for n in range(1, c.num_heads + 1)
        if all(w % n == 0 for w in whole) and (c.num_kv_heads % n == 0 or n % c.num_kv_heads == 0)
    )


def check_counts(c: ModelConfig, *, context: int, **counts: int) -> None:
    """ConfigError for a count that is no positive integer, and for a context that the model does not have."""
    for name, number in (*counts.items(), ("context", context)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigError(f"{name}={number!r}: expected a positive integer")
    if context > c.max_position:
        raise ConfigError(f"context={context}: expected 1..{c.max_position}, the context of {c.name}")


def _check(c: ModelConfig, chip: str, gpus: int, weights: str, head: str, kv: str, context: int, batch: int) -> None:
    formats = get_args(PlanWeights)
    choices = (
        ("gpu", chip, tuple(GPUS)),
        ("weights", weights, formats),
        ("head", head, formats),
        ("kv", kv, get_args(PlanKV)),
    )
    for name, value, known in choices:
        if value not in known:
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(known)}")
    check_counts(c, gpus=gpus, context=context, batch=batch)
    if gpus not in valid_gpu_counts(c):
        raise ConfigError(
            f"gpus={gpus}: expected one of {', '.join(map(str, valid_gpu_counts(c)))}, which divide num_heads="
            f"{c.num_heads} and d_ff={c.d_ff or c.dense_d_ff} and share num_kv_heads={c.num_kv_heads} evenly"
        )


def stored_checkpoint(path: Path, config: ModelConfig) -> Checkpoint | None:
    """The checkpoint of `config` in a file, or in a folder that holds tensors; None for a configuration alone."""
    holds = (gguf_file(path), is_packed_folder(path), path.is_dir() and is_hf_folder(path), (path / "ckpt-0").is_dir())
    return open_checkpoint(path, config) if any(holds) else None


def plan(
    config: ModelConfig,
    *,
    chip: str,
    gpus: int | None = None,
    weights: PlanWeights = "int8",
    head: PlanWeights | None = None,
    kv: PlanKV = "bf16",
    context: int | None = None,
    batch: int = 1,
    checkpoint: Checkpoint | None = None,
) -> Plan:
    """What `config` needs on `gpus` of `chip`, with `batch` requests of `context` tokens (None: the model's own).

    gpus None: the fewest that hold it, or, where no count does, as many as can share the model. checkpoint: of this
    model, of which the plan says what it takes on a CPU as it is stored. head: None is bf16 and, on a CPU, as stored.

    Raises ConfigError, with the value and what was expected, for an unknown GPU or format, a count of GPUs that does
    not divide the model, and a context or batch out of range.
    """
    context, asked, head = config.max_position if context is None else context, head, head or "bf16"
    _check(config, chip, 1 if gpus is None else gpus, weights, head, kv, context, batch)
    gpu, resident = GPUS[chip], cached_tokens(config, context)
    usable = int(gpu.memory * (1 - RESERVED))

    def free(n: int) -> int:
        return usable - _weights(config, weights, n, head).total - _workspace(config, n, context, batch)

    def kv_token(n: int) -> int:
        return kv_bytes_per_token(config, kv, _kv_heads(config, n))

    def headroom(n: int) -> int:
        return free(n) - batch * resident * kv_token(n)

    valid = valid_gpu_counts(config)
    fewest = next((n for n in valid if headroom(n) >= 0), None)
    gpus = gpus or fewest or valid[-1]
    capacity = max(0, free(gpus)) // kv_token(gpus)
    pairs = batch * resident
    step = _step_cost(config, weights, head, kv, gpus, tokens=batch, cached=pairs, pairs=pairs, rows=batch)
    decode = iter([(step, _link_s(config, gpu, gpus, batch, batch))])
    return Plan(
        model=config.name,
        chip=chip,
        gpus=gpus,
        weights=weights,
        head=head,
        kv=kv,
        context=context,
        batch=batch,
        params_total=config.param_count(),
        params_active=config.active_param_count(),
        released_bytes=released_bytes(config),
        memory_bytes=gpu.memory,
        usable_bytes=usable,
        weight_bytes=_weights(config, weights, gpus, head).total,
        workspace_bytes=_workspace(config, gpus, context, batch),
        kv_bytes=batch * resident * kv_token(gpus),
        kv_bytes_per_token=kv_bytes_per_token(config, kv, config.num_kv_heads),
        kv_bytes_per_token_gpu=kv_token(gpus),
        kv_tokens_per_request=resident,
        fits=headroom(gpus) >= 0,
        headroom_bytes=headroom(gpus),
        kv_capacity_tokens=capacity,
        max_requests=capacity // resident,
        valid_gpus=valid,
        min_gpus=fewest,
        decode=_time(decode, gpu, weights, batch),
        prefill=_time(_prefill_steps(config, gpu, weights, head, kv, gpus, context), gpu, weights, context),
        assumptions=tuple(_assumptions(config, gpu, gpus, weights, head, kv)),
        stored_bytes=None if checkpoint is None else total_bytes(checkpoint),
        on_cpu=None if checkpoint is None else held_matrices(config, checkpoint, asked),
    )


def _assumptions(
    c: ModelConfig, chip: Gpu, n: int, weights: PlanWeights, head: PlanWeights, kv: PlanKV
) -> Iterator[str]:
    bf16, fp8 = chip.bf16 / 1e12, chip.fp8 / 1e12
    scales = {
        "int8": f"fp32 scales in {GROUPS} groups of rows on attention output and down projections, 1 group elsewhere",
        "fp8": "one fp32 scale an output channel",
        "bf16": "no scales",
    }
    products = {
        "int8": f"int8 made bf16 (exactly), {bf16:.0f} TFLOP/s",
        "fp8": f"fp8 at {fp8:.0f} TFLOP/s" if fp8 else f"{chip.name} has none in fp8: made bf16, {bf16:.0f} TFLOP/s",
        "bf16": f"bf16 at {bf16:.0f} TFLOP/s",
    }
    e, a, rate = c.num_experts, c.num_experts_per_tok, _link_rate(chip, n) / 1e9
    copied = f"; {c.num_kv_heads} kv heads copied over {n} GPUs" if n > c.num_kv_heads else ""
    window = f"; a sliding window keeps {c.sliding_window} tokens a request" if c.sliding_window else ""
    memory = f"{chip.memory / 1e9:.1f} GB as drivers report it"
    yield f"memory: {memory}, {RESERVED:.0%} left to context, buffers, fragmentation"
    yield f"sharding: heads, widths F of each expert and vocabulary split over GPUs; norms and router on each{copied}"
    yield f"weights: {weights} matrices, {scales[weights]}; bf16 embedding, {head} output head; fp32 norms and router"
    yield f"KV: {'2 bytes a value' if kv == 'bf16' else '1 byte a value, and an fp32 scale a token and head'}{window}"
    yield (
        "workspace: 2 bytes x T(4D + 2HC + 2GC + 3F_dense + A(3F + 2D)), all but D divided by GPUs, "
        f"T = max(batch, min(context, {CHUNK})); two fp32 rows of logits a request"
    )
    yield f"products: {products[weights]}; attention, router and output head in bf16"
    yield f"time: datasheet peaks, {chip.bandwidth / 1e12:.2f} TB/s; activations and KV writes not counted"
    if e:
        yield f"routing: even, so that T tokens read {e}(1 - (1 - {a}/{e})^T) experts"
    if n > 1:
        links = f"{rate:.0f} GB/s, {START_S * 1e6:.0f} us to start each"
        yield f"links: 2 ring all-reduces a layer, 1 gather of logits, {links}"
    yield f"prefill: one request, {CHUNK} tokens a step; decode: every request at its full context"
