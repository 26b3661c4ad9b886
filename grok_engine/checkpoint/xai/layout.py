"""Which tensor each file of an xAI checkpoint holds. The files carry no names: a name follows from a file's index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.config import ModelConfig

from .pickle_machine import ArrayPlace
from .pickles import Array

Kind = Literal["embedding", "attention", "expert", "router", "norm"]
FLOATS = ("float32", "bfloat16")
GROUPS = 8  # of input rows with scales of their own, in attention's output and the experts' down projections


def release_groups(name: str) -> int:
    """How many groups of scales along the input the release has for a quantised matrix."""
    return GROUPS if name.endswith((".o", ".down")) else 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one file has to hold. `shape` is (in, out), with the experts in front; `reference` is xAI's own name."""

    index: int
    name: str
    reference: str
    kind: Kind
    shape: tuple[int, ...]
    quantizable: bool

    @property
    def file(self) -> str:
        return f"tensor{self.index:05d}_000"

    @property
    def transposed(self) -> bool:
        """Whether `shape` ends in (in, out): every matrix but the embedding, which has a row for each token."""
        return self.kind in ("attention", "expert", "router")

    def scales_shape(self, groups: int) -> tuple[int, ...]:
        """The shape of scales with this many groups along the input, each in/groups consecutive rows."""
        return (*self.shape[:-2], groups, self.shape[-1])

    def problems(self, weight: Array | ArrayPlace, scales: Array | ArrayPlace | None) -> Iterator[str]:
        """One line for each thing that is wrong with the tensor found."""
        who, dtype = f"{self.file} ({self.name})", weight.dtype.name
        if weight.shape != self.shape:
            yield f"{who}: expected shape {self.shape}, found {weight.shape}"
        if scales is None:
            if dtype not in FLOATS:
                also = ", or int8 with scales" if self.quantizable else ""
                yield f"{who}: expected float32 or bfloat16{also}, found {dtype} without scales"
            return
        if not self.quantizable:
            yield f"{who}: expected a bare float32 or bfloat16 array, found {dtype} with scales {scales.shape}"
            return
        if dtype != "int8":
            yield f"{who}: expected int8 beside scales, found {dtype}"
        if scales.dtype.name not in FLOATS:
            yield f"{who}: expected bfloat16 or float32 scales, found {scales.dtype}"
        groups = scales.shape[-2] if len(scales.shape) == len(self.shape) else 0
        if groups < 1 or self.shape[-2] % groups or scales.shape != self.scales_shape(groups):
            one = ", ".join(map(str, (*self.shape[:-2], "groups", self.shape[-1])))
            yield (
                f"{who}: expected scales of shape ({one}), with a number of groups that divides "
                f"{self.shape[-2]} input rows, found {scales.shape}"
            )


def layout(config: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the checkpoint, in the order of the files.

    Raises CheckpointError for an architecture that the format has no names for.
    """
    c = config
    expected = (
        ("num_experts", c.num_experts > 1, "at least 2"),
        ("dense_d_ff", c.dense_d_ff == 0, "0"),
        ("post_norms", c.post_norms, "True"),
        ("tie_embeddings", c.tie_embeddings, "True"),
    )
    problems = tuple(
        f"{name}={getattr(c, name)!r}: xAI's checkpoints expect {what}" for name, fits, what in expected if not fits
    )
    if problems:
        raise CheckpointError(f"model {c.name!r}: " + "; ".join(problems), problems)
    d, q, kv = c.d_model, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    wide, narrow = (c.num_experts, d, c.d_ff), (c.num_experts, c.d_ff, d)
    slots: tuple[tuple[str, str, Kind, tuple[int, ...]], ...] = (
        ("moe.gate", "moe/linear/w", "expert", wide),
        ("moe.down", "moe/linear_1/w", "expert", narrow),
        ("moe.up", "moe/linear_v/w", "expert", wide),
        ("attn.k", "multi_head_attention/key/w", "attention", (d, kv)),
        ("attn.o", "multi_head_attention/linear/w", "attention", (q, d)),
        ("attn.q", "multi_head_attention/query/w", "attention", (d, q)),
        ("attn.v", "multi_head_attention/value/w", "attention", (d, kv)),
        ("norm.pre_attn", "rms_norm/scale", "norm", (d,)),
        ("norm.post_attn", "rms_norm_1/scale", "norm", (d,)),
        ("norm.pre_moe", "rms_norm_2/scale", "norm", (d,)),
        ("norm.post_moe", "rms_norm_3/scale", "norm", (d,)),
        ("moe.router", "router/w", "router", (d, c.num_experts)),
    )
    specs = [
        TensorSpec(0, "embed", "language_model/in_out_embed/embeddings", "embedding", (c.vocab_size, d), False),
        TensorSpec(1, "final_norm", "language_model/rms_norm/scale", "norm", (d,), False),
    ]
    # The files follow the sorted names, so layer 10 comes before layer 2.
    for layer in sorted(range(c.num_layers), key=str):
        for name, reference, kind, shape in slots:
            name, reference = f"layers.{layer}.{name}", f"transformer/decoder_layer_{layer}/{reference}"
            specs.append(TensorSpec(len(specs), name, reference, kind, shape, kind in ("attention", "expert")))
    return specs
