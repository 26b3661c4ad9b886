"""Small models as GGUF files, written with the gguf package, and what their tensors mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from grok_engine.config import ModelConfig

Array = np.ndarray[Any, Any]
D, F, HEADS, KV_HEADS, C, VOCAB, LAYERS, EXPERTS = 256, 512, 4, 2, 64, 300, 2, 4


def shapes(experts: int = 0, tied: bool = False, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """The tensors of a model in the llama architecture, (N, K)."""
    found: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, D), "output_norm": (D,)}
    if not tied:
        found["output"] = (VOCAB, D)
    for i in range(layers):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (D,), "attn_q": (HEADS * C, D), "attn_k": (KV_HEADS * C, D), "attn_v": (KV_HEADS * C, D),
            "attn_output": (D, HEADS * C), "ffn_norm": (D,),
        }  # fmt: skip
        if experts:
            wide, narrow = (experts, F, D), (experts, D, F)
            layer |= {"ffn_gate_inp": (experts, D), "ffn_gate_exps": wide, "ffn_up_exps": wide, "ffn_down_exps": narrow}
        else:
            layer |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
        found |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in found.items()}


def stored(shape: tuple[int, ...], kind: Kind, rng: np.random.Generator) -> Array:
    """Random blocks of a type: bytes (…, of a row) for quantised ones, the values of others.

    Any bytes are blocks. Only the scales are chosen, since random ones would be infinite or NaN.
    """
    if len(shape) == 1 or kind == Kind.F32:
        return rng.standard_normal(shape, dtype=np.float32)
    columns, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if columns == 1:
        return gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32), kind)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // columns, nbytes), dtype=np.uint8)
    halves = {Kind.Q6_K: (208,), Kind.Q4_0: (0,), Kind.Q5_0: (0,), Kind.Q8_0: (0,)}.get(kind, (0, 2))
    for at in halves:
        size = 64 if columns < 256 else 2048  # so that weights are of about the same size in all types
        scales = (rng.standard_normal(blocks.shape[:-1]) / size).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def dequantized(data: Array, kind: Kind) -> Array:
    """fp32, as the gguf package has it."""
    return data if data.dtype == np.float32 else gguf.quants.dequantize(data, kind)


def halves(w: Array, heads: int) -> Array:
    """Rows of q or k as transformers has them, from those of a llama file: the inverse of its converter's
    `w.reshape(heads, 2, C / 2, K).swapaxes(1, 2)`."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


class Writer(gguf.GGUFWriter):
    """A writer with the metadata of the models here."""

    def __init__(self, path: Path, experts: int = 0, layers: int = LAYERS, arch: str = "llama") -> None:
        super().__init__(path, arch)
        self.add_block_count(layers)
        self.add_context_length(64)
        self.add_embedding_length(D)
        self.add_feed_forward_length(F)
        self.add_head_count(HEADS)
        self.add_head_count_kv(KV_HEADS)
        self.add_layer_norm_rms_eps(1e-5)
        self.add_vocab_size(VOCAB)
        if experts:
            self.add_expert_count(experts)
            self.add_expert_used_count(2)

    def finish(self) -> None:
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def write_model(
    path: Path,
    kinds: Mapping[str, Kind] | Kind,
    experts: int = 0,
    *,
    tied: bool = False,
    layers: int = LAYERS,
    change: Callable[[Writer], None] | None = None,
) -> dict[str, tuple[Array, Kind]]:
    """A random model in the llama architecture. kinds: of every matrix, or by the end of its name, others F32. change:
    adds metadata.

    Returns its tensors as stored, by name.
    """
    rng = np.random.default_rng(7)
    writer, tensors = Writer(path, experts, layers), {}
    if change is not None:
        change(writer)
    for name, shape in shapes(experts, tied, layers).items():
        if isinstance(kinds, Mapping):
            kind = next((kind for end, kind in kinds.items() if name.endswith(f"{end}.weight")), Kind.F32)
        else:
            kind = kinds
        if len(shape) == 1 or "ffn_gate_inp" in name:
            kind = Kind.F32
        tensors[name] = stored(shape, kind, rng), kind
        writer.add_tensor(name, tensors[name][0], raw_dtype=kind)
    writer.finish()
    return tensors


def split(
    folder: Path, tensors: Mapping[str, tuple[Array, Kind]], lies: Mapping[str, int] | None = None, **options: Any
) -> list[Path]:
    """The model in three files, the first of which has the metadata. lies: what `split.*` says instead of the truth."""
    count, names, files, lies = 3, list(tensors), [], lies or {}
    for number in range(count):
        files.append(folder / f"model-{number + 1:05d}-of-{count:05d}.gguf")
        writer = Writer(files[-1], **options) if number == 0 else gguf.GGUFWriter(files[-1], "llama")
        writer.add_uint16("split.no", lies.get("no", number))
        writer.add_uint16("split.count", lies.get("count", count))
        writer.add_int32("split.tensors.count", lies.get("total", len(names)))
        for name in names[number::count]:
            writer.add_tensor(name, tensors[name][0], raw_dtype=tensors[name][1])
        Writer.finish(writer)  # type: ignore[arg-type]
    return files


def meaning(tensors: Mapping[str, tuple[Array, Kind]]) -> dict[str, Array]:
    """fp32 values by the engine's names, rows as the engine has them."""
    ours = {
        "token_embd": "embed", "output_norm": "final_norm", "output": "lm_head", "attn_norm": "norm.pre_attn",
        "attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v", "attn_output": "attn.o", "ffn_norm": "norm.pre_moe",
        "ffn_gate": "mlp.gate", "ffn_up": "mlp.up", "ffn_down": "mlp.down", "ffn_gate_inp": "moe.router",
        "ffn_gate_exps": "moe.gate", "ffn_up_exps": "moe.up", "ffn_down_exps": "moe.down",
    }  # fmt: skip
    found = {}
    for name, (data, kind) in tensors.items():
        *layer, stem, _ = name.removeprefix("blk.").split(".")
        values = dequantized(data, kind)
        if stem in ("attn_q", "attn_k"):
            values = halves(values, HEADS if stem == "attn_q" else KV_HEADS)
        found[".".join(["layers", *layer, ours[stem]] if layer else [ours[stem]])] = values
    return found


def config(experts: int = 0, *, tied: bool = False, **changes: Any) -> ModelConfig:
    """What the engine should read."""
    width = {"num_experts": experts, "num_experts_per_tok": 2, "d_ff": F, "renormalize": True}
    fields = dict(
        name="model", vocab_size=VOCAB, d_model=D, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=KV_HEADS,
        head_dim=C, activation="silu", post_norms=False, norm_eps=float(np.float32(1e-5)), max_position=64,
        tie_embeddings=tied, bos_token_id=None, eos_token_ids=(), **(width if experts else {"dense_d_ff": F}),
    )  # fmt: skip
    return ModelConfig(**{**fields, **changes})
