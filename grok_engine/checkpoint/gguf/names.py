"""GGUF's names of tensors, and the order in which llama.cpp wants rows."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_OUTER = {"token_embd": "embed", "output_norm": "final_norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "norm.pre_attn",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.o",
    "attn_output_norm": "norm.post_attn",
    "ffn_norm": "norm.pre_moe",
    "layer_output_norm": "norm.post_moe",
    "post_ffw_norm": "norm.post_moe",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
    "ffn_gate_inp": "moe.router",
    "ffn_gate_exps": "moe.gate",
    "ffn_up_exps": "moe.up",
    "ffn_down_exps": "moe.down",
}
_OUTER_FILE = {ours: theirs for theirs, ours in _OUTER.items()}
_LAYER_FILE = {ours: theirs for theirs, ours in _LAYER.items() if theirs != "post_ffw_norm"}  # Grok's other name
FACTORS = "rope_freqs.weight"  # read with the metadata: not a weight of the model


def engine_names(names: Iterable[str]) -> dict[str, list[str]]:
    """The engine's name of each tensor, and the tensors that it is made of.

    Those are one, or a file's one for each expert, in their order. A tensor that has no place keeps its own name, under
    which no module will look.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if name != FACTORS:
            ours, expert = _engine_name(name)
            if expert in found.get(ours, {}):  # stacked and by the expert, or a norm under both of its names
                ours = name
            found.setdefault(ours, {})[expert] = name
    whole: dict[str, list[str]] = {}
    for ours, parts in found.items():
        if sorted(parts) == list(range(len(parts))):
            whole[ours] = [parts[expert] for expert in range(len(parts))]
        else:
            whole.update({name: [name] for name in parts.values()})
    return whole


def _engine_name(name: str) -> tuple[str, int]:
    stem = name.removesuffix(".weight")
    if stem == name:
        return name, 0
    if stem in _OUTER:
        return _OUTER[stem], 0
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.([a-z_]+)(?:\.(0|[1-9]\d{0,5}))?", stem)
    if match is None:
        return name, 0
    layer, kind, expert = match.groups()
    kind = kind if expert is None else f"{kind}_exps"
    return (f"layers.{layer}.{_LAYER[kind]}", int(expert or 0)) if kind in _LAYER else (name, 0)


def file_name(name: str) -> str:
    """The name in a file of one of the engine's tensors, experts stacked."""
    if (outer := _OUTER_FILE.get(name)) is not None:
        return f"{outer}.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_LAYER_FILE[rest]}.weight"


def interleaved_rows(heads: int, head_dim: int) -> NDArray[np.int64]:
    """In which row of a file the rows of q or k lie, for architectures whose files rotate neighbouring pairs.

    The engine rotates the halves of a head against each other. Row c of a half h is row 2c + h in the file's head.
    """
    pairs = np.arange(heads * head_dim, dtype=np.int64).reshape(heads, head_dim // 2, 2)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)
