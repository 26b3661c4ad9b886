"""What a model is and how an engine runs it: frozen dataclasses, resolved before anything is built.

The key to the shape suffixes used everywhere (`x_TD` is tokens by model width):

    T tokens        B requests        D model width     V vocabulary
    H query heads   G kv heads        C head size       X fused q, k, v columns, (H + 2G)·C
    E experts       A active experts  F expert width    P pages, S slots in a page

GEMM code says M, N, K instead.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, get_args

import numpy as np

Activation = Literal["gelu_tanh", "gelu", "silu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


class ConfigError(ValueError):
    """A configuration that names something unknown or cannot be built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The architecture of one decoder. Every difference between the families is a field here.

    A softcap of 0 is none, `sliding_window` 0 is full attention, `attn_temperature_len` 0 is off.
    `num_experts` 0 is a dense model, whose one feed-forward block has width `dense_d_ff`; a model
    with both has a dense branch beside its experts, and the two outputs are summed over √2.
    `rope_factors` divide the C/2 rotary frequencies, one each; none leaves them as `rope_theta` gives them.
    """

    name: str = "custom"
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int = 0
    num_experts_per_tok: int = 0
    d_ff: int = 0
    dense_d_ff: int = 0
    activation: Activation = "gelu_tanh"
    post_norms: bool = True
    attn_softcap: float = 0.0
    router_softcap: float = 0.0
    final_softcap: float = 0.0
    renormalize: bool = False
    embedding_multiplier: float = 1.0
    output_multiplier: float = 1.0
    attn_scale: float = 0.0  # 0 resolves to head_dim ** -0.5
    rope_theta: float = 1e4
    rope_factors: tuple[float, ...] = ()
    attn_temperature_len: int = 0
    sliding_window: int = 0
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    max_position: int = 8192
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        problems = list(_wrong_types(self))
        if not problems:
            if self.attn_scale == 0 and 0 < self.head_dim <= _BOUNDS["head_dim"]:
                object.__setattr__(self, "attn_scale", self.head_dim**-0.5)  # resolved once, here
            problems = list(_problems(self))
        if problems:
            raise ConfigError(f"model {shown(self.name)}: " + "; ".join(problems))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From this class's own field names; an unknown key is an error that names it."""
        check_keys(values, {f.name for f in fields(cls)}, set(_REQUIRED), "model configuration")
        tuples = [key for key in ("eos_token_ids", "rope_factors") if isinstance(values.get(key), list)]  # as JSON has
        return cls(**{**values, **{key: tuple(values[key]) for key in tuples}})

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as `from_dict` takes it back."""
        return asdict(self)

    @property
    def qkv_dim(self) -> int:
        """X: columns of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def param_count(self) -> int:
        """Parameters in total."""
        return self._params(self.num_experts)

    def active_param_count(self) -> int:
        """Parameters that one token's forward pass multiplies by (a tied embedding once)."""
        return self._params(self.num_experts_per_tok)

    def _params(self, experts: int) -> int:
        d, hc = self.d_model, self.num_heads * self.head_dim
        attention = d * self.qkv_dim + hc * d
        feed_forward = 3 * d * (experts * self.d_ff + self.dense_d_ff) + d * self.num_experts
        norms = d * (4 if self.post_norms else 2)
        embeddings = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return self.num_layers * (attention + feed_forward + norms) + embeddings + d


_REQUIRED = ("d_model", "head_dim", "num_heads", "num_kv_heads", "num_layers", "vocab_size")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a number that fp64 holds: no integer of 400 digits."""
    return isinstance(value, (int, float)) and as_float(value) is not None


def as_int(value: Any) -> int | None:
    """An integer, numpy's too, as Python's; None for any other value, bools among them."""
    if type(value) is int:  # an abstract class takes ten times as long to ask, and a prompt is long
        return value
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_float(value: Any) -> float | None:
    """A real number, numpy's too, as Python's; None for any other value, and for an integer beyond fp64."""
    if type(value) is float:
        return value
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def as_bool(value: Any) -> bool | None:
    """A bool, numpy's too, as Python's; None for any other value."""
    return bool(value) if isinstance(value, (bool, np.bool_)) else None


def shown(value: Any) -> str:
    """A value as an error message shows it: `repr`, but never long, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # an integer of 5000 digits, a list that contains itself through a faulty __repr__
        return f"<{type(value).__name__} that has no repr>"
    return text if len(text) <= 200 else f"{text[:200]}…"


def described(error: BaseException) -> str:
    """An exception as an error message shows it: its type, and what it says if it says anything."""
    try:
        text = str(error)
    except Exception:  # a user's exception class
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# By annotation: a JSON file can put anything under any key.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("an integer", is_int),
    "float": ("a number", is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "Activation": ("text", lambda value: isinstance(value, str)),
    "int | None": ("an integer or null", lambda value: value is None or is_int(value)),
    "tuple[int, ...]": ("a list of integers", lambda value: isinstance(value, tuple) and all(map(is_int, value))),
    "tuple[float, ...]": ("a list of numbers", lambda value: isinstance(value, tuple) and all(map(is_number, value))),
}


def _wrong_types(c: ModelConfig) -> Iterator[str]:
    for field in fields(c):
        value = getattr(c, field.name)
        what, fits = _TYPES[str(field.type)]
        if not fits(value):
            yield f"{field.name}={shown(value)} is not {what}"


# Far beyond every model; what a broken file says beyond them would take hours or all memory before it failed.
_BOUNDS = {
    "vocab_size": 1 << 24,
    "d_model": 1 << 20,
    "num_layers": 1 << 12,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "num_experts": 1 << 12,
    "num_experts_per_tok": 1 << 12,
    "d_ff": 1 << 22,
    "dense_d_ff": 1 << 22,
    "sliding_window": 1 << 40,
    "attn_temperature_len": 1 << 40,
    "max_position": 1 << 28,
}
_MAX_EXPERTS = 1 << 17  # in all layers


def _problems(c: ModelConfig) -> Iterator[str]:
    for name, bound in _BOUNDS.items():
        least = 1 if name in _REQUIRED or name == "max_position" else 0
        if not least <= (value := getattr(c, name)) <= bound:
            what = "a positive integer" if least else "an integer of 0 or more"
            yield f"{name}={shown(value)} is not {what}" + (f" up to {bound}" if value > bound else "")
            return
    for name in ("attn_softcap", "router_softcap", "final_softcap"):
        if not 0 <= (value := getattr(c, name)) < math.inf:
            yield f"{name}={value!r} is not a finite number of 0 (none) or more"
    for name in ("embedding_multiplier", "output_multiplier", "attn_scale", "rope_theta", "norm_eps"):
        if not 0 < (value := getattr(c, name)) < math.inf:
            yield f"{name}={value!r} is not a finite positive number"
    if c.num_layers * c.num_experts > _MAX_EXPERTS:
        yield f"num_layers={c.num_layers} of num_experts={c.num_experts} have more than {_MAX_EXPERTS} experts in all"
    if c.num_heads % c.num_kv_heads:
        yield f"num_heads={c.num_heads} is not a multiple of num_kv_heads={c.num_kv_heads}"
    if c.head_dim % 2:
        yield f"head_dim={c.head_dim} is odd: rotary embedding turns its two halves against each other"
    elif c.rope_factors and len(c.rope_factors) != c.head_dim // 2:
        yield f"rope_factors has {len(c.rope_factors)} numbers, expected none or head_dim / 2 = {c.head_dim // 2}"
    for factor in c.rope_factors:
        if not 0 < factor < math.inf:
            yield f"rope_factors holds {shown(factor)}, expected finite positive numbers"
            return
    if c.activation not in ACTIVATIONS:
        yield f"activation={c.activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if c.num_experts == 0:
        if c.num_experts_per_tok or c.d_ff or c.router_softcap or c.renormalize:
            yield (
                f"num_experts=0 (dense) with num_experts_per_tok={c.num_experts_per_tok}, d_ff={c.d_ff}, "
                f"router_softcap={c.router_softcap}, renormalize={c.renormalize}: expected none of them"
            )
        if c.dense_d_ff == 0:
            yield "num_experts=0 and dense_d_ff=0: the model has no feed-forward block"
    else:
        if not 1 <= c.num_experts_per_tok <= c.num_experts:
            yield f"num_experts_per_tok={c.num_experts_per_tok} is not in 1..num_experts={c.num_experts}"
        if c.d_ff == 0:
            yield f"d_ff=0 with num_experts={c.num_experts}: expected the experts' width"
    if c.attn_temperature_len == 1:
        yield "attn_temperature_len=1 divides by log2(1) = 0: expected 0 (off) or at least 2"
    for name, tokens in (("bos_token_id", (c.bos_token_id,)), ("eos_token_ids", c.eos_token_ids)):
        wrong = [token for token in tokens if token is not None and not 0 <= token < c.vocab_size]
        if wrong:
            yield f"{name}: special token {shown(wrong[0])} is not in 0..{c.vocab_size - 1}"


def check_keys(values: Mapping[str, Any], known: set[str], required: set[str], what: str) -> None:
    unknown = sorted(set(values) - known)
    missing = sorted(required - set(values))
    if unknown or missing:
        parts = [f"unknown key {', '.join(map(repr, unknown))}"] if unknown else []
        parts += [f"missing key {', '.join(map(repr, missing))}"] if missing else []
        raise ConfigError(f"{what}: {'; '.join(parts)}; known keys: {', '.join(sorted(known))}")


DType = Literal["bfloat16", "float32"]
WeightFormat = Literal["int8", "int8_g128", "int4", "int4_g128", "fp8", "bf16", "fp32"]
ActFormat = Literal["none", "fp8", "int8"]
KVDType = Literal["bfloat16", "float32", "fp8_e4m3"]
GenerationConfig = Literal["auto", "vllm"]


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineConfig` but `model`, as keyword arguments."""

    dtype: DType
    device: str
    weights: WeightFormat | None
    head: WeightFormat | None
    activations: ActFormat | None
    mmap: bool
    kv_dtype: KVDType | None
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int | None
    kv_memory: int | None
    enable_prefix_caching: bool
    enforce_eager: bool
    seed: int | None
    generation_config: GenerationConfig
    max_n: int
    max_logprobs: int
    max_stop_bytes: int
    max_grammar_bytes: int
    max_grammar_depth: int
    max_grammar_rules: int
    grammar_seconds: float
    max_waiting: int
    expert_load: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is run, and the largest request that is served.

    weights: what matrices are converted to; None keeps what the checkpoint holds.
    head: what the output head is converted to, from the checkpoint's values; None is as `weights` or, where the head is
    the embedding, as that lies. With a format, such a head becomes a second matrix, unless the embedding lies in that
    format already: lookups stay as they were, and memory grows by the head. Of a converted checkpoint the head that it
    holds stays in memory too, unless mapped.
    activations: what the layers' large products quantise their activations to, with a scale per token and group of 128,
    and with "int8" the output head's, where its weights are integers of 8 bits or fewer. None is "fp8" where e4m3
    weights meet a GPU that multiplies e4m3, else "none", so released int8 values stay exact.
    mmap: run on the mapped file of a converted model instead of a copy in memory. It starts at once, shares its pages
    with other processes, and is slower until they are in memory.
    kv_dtype: of keys and values; None is `dtype`.
    max_model_len: tokens of a request, prompt and answer together; None is the model's own context, or what memory
    holds of it (`runtime/memory.py`).
    max_num_seqs, max_num_batched_tokens: sequences that run at once, and tokens of one step.
    num_pages, kv_memory: size of the KV cache in pages or in bytes, one of them. With neither it is what a GPU has
    left, and on a CPU 2 GiB, or one request of max_model_len if that takes more, of at most half of the memory that the
    weights leave. A size in bytes, given or not, is capped at what max_num_seqs requests of max_model_len take. Sizes
    that do not fit into memory are a ConfigError before anything is loaded.
    enforce_eager: launch the kernels of a decode step one by one instead of replaying a CUDA graph or, on a CPU, a
    recording. Slower, with the same results; hooks on the model's modules run in every step.
    seed: of requests that bring none, so that a run can be repeated; None draws fresh ones.
    generation_config: how requests without SamplingParams sample: "auto" as the model's files say, "vllm" by the
    defaults of SamplingParams.

    The limits of one request. What exceeds them is refused with a ValueError before it costs other requests anything.
    max_n: answers of a request.
    max_logprobs: of logprobs and prompt_logprobs; -1 lifts the limit, and the whole vocabulary may be asked for.
    max_stop_bytes: of stop and bad_words together, in UTF-8.
    max_grammar_bytes, max_grammar_depth, max_grammar_rules: of a structured output's text in UTF-8, how deep its
    brackets are nested, and how many rules or references it has. grammar_seconds: what compiling it may take.
    max_waiting: requests that wait for their first step.

    expert_load: count the tokens that the router sends to each expert of each layer, in `EngineStats.expert_load` and
    for requests that ask for it. It copies the router's choices to the host in every step, and changes no result.
    """

    model: ModelConfig
    dtype: DType = "bfloat16"
    device: str = "cpu"
    weights: WeightFormat | None = None
    head: WeightFormat | None = None
    activations: ActFormat | None = None
    mmap: bool = False
    kv_dtype: KVDType | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    page_size: int = 16
    num_pages: int | None = None
    kv_memory: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    seed: int | None = None
    generation_config: GenerationConfig = "auto"
    max_n: int = 128
    max_logprobs: int = 20
    max_stop_bytes: int = 16384
    max_grammar_bytes: int = 65536
    max_grammar_depth: int = 100
    max_grammar_rules: int = 1000
    grammar_seconds: float = 5.0
    max_waiting: int = 8192
    expert_load: bool = False

    @classmethod
    def of(cls, model: ModelConfig, options: Mapping[str, Any]) -> EngineConfig:
        """From options by name; dtypes and the device also as torch has them. ConfigError for an unknown name."""
        known = [f.name for f in fields(cls) if f.name != "model"]
        for option in options:
            if option not in known:
                near = _VLLM_OPTIONS.get(option) or next(iter(difflib.get_close_matches(option, known, 1)), None)
                hint = f", perhaps {near}" if near else ""
                raise ConfigError(f"unknown option {option!r}{hint}: expected one of {', '.join(known)}")
        named = {
            name: str(value).removeprefix("torch.")
            for name in ("dtype", "kv_dtype", "device")
            if type(value := options.get(name)).__module__ == "torch"
        }
        return cls(model=model, **{**options, **named})

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelConfig):
            raise ConfigError(f"model={shown(self.model)} is not a ModelConfig")
        if self.max_model_len is None:
            object.__setattr__(self, "max_model_len", self.model.max_position)
        if self.kv_dtype is None:
            object.__setattr__(self, "kv_dtype", self.dtype)
        for field in fields(self)[1:]:
            object.__setattr__(self, field.name, self._read(field.name, str(field.type)))  # resolved once, here
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "expected a token a step for each sequence at least"
            )
        if self.expert_load and not self.model.num_experts:
            raise ConfigError(f"expert_load=True is for models with experts: {shown(self.model.name)} has none")
        if self.num_pages is not None and self.kv_memory is not None:
            raise ConfigError(f"num_pages={self.num_pages} and kv_memory={self.kv_memory}: expected one of them")
        if self.num_pages is not None and self.num_pages * self.page_size > _INT32_MAX:
            raise ConfigError(
                f"num_pages={self.num_pages} of page_size={self.page_size} hold more than {_INT32_MAX} tokens, "
                "which 32-bit slot numbers cannot count"
            )

    def _read(self, name: str, kind: str) -> Any:
        """The field as Python's own type; ConfigError if it is of another type or out of its range."""
        value, optional = getattr(self, name), kind.endswith("| None")
        if value is None and optional:
            return None
        read: Any
        if name in _LITERALS:
            allowed = get_args(_LITERALS[name])
            read = value if isinstance(value, str) and value in allowed else None
            expected = f"one of {', '.join(allowed)}"
        elif kind == "bool":
            read, expected = as_bool(value), "True or False"
        elif kind == "str":
            read, expected = value if isinstance(value, str) else None, "text"
        elif kind == "float":
            number = as_float(value)
            read = number if number is not None and 0 < number <= _DAY else None
            expected = f"a number of seconds in (0, {_DAY}]"
        else:
            least, most = (
                _RANGES.get(name, (1, _INT32_MAX)) if name != "max_model_len" else (1, self.model.max_position)
            )
            integer = as_int(value)
            read = integer if integer is not None and least <= integer <= most else None
            expected = f"an integer in {least}..{most}"
        if read is None:
            raise ConfigError(f"{name}={shown(value)} is not {expected}{', or None' if optional else ''}")
        return read

    @property
    def max_len(self) -> int:
        """`max_model_len`, resolved."""
        assert self.max_model_len is not None
        return self.max_model_len


_VLLM_OPTIONS = {
    "gpu_memory_utilization": "kv_memory (bytes)",
    "block_size": "page_size",
    "kv_cache_dtype": "kv_dtype",
    "quantization": "weights",
}
_LITERALS: dict[str, Any] = {
    "dtype": DType,
    "weights": WeightFormat,
    "head": WeightFormat,
    "activations": ActFormat,
    "kv_dtype": KVDType,
    "generation_config": GenerationConfig,
}
_INT32_MAX = 2**31 - 1
_DAY = 86400
_RANGES = {  # of integers; the others are in 1..2**31 - 1
    "max_num_seqs": (1, 65536),
    "page_size": (1, 4096),
    "kv_memory": (1, 2**63 - 1),
    "seed": (0, 2**63 - 1),
    "max_logprobs": (-1, _INT32_MAX),
    "max_stop_bytes": (0, _INT32_MAX),
    "max_grammar_bytes": (0, _INT32_MAX),
}
