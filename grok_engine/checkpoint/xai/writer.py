"""Writes a checkpoint in the format of xAI's open release, so that any reader of that format can load it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from grok_engine.config import ConfigError, ModelConfig, ffn_width

from .layout import layout
from .pickle_writer import write_pickle
from .pickles import Array, CheckpointError

Tensor: TypeAlias = "tuple[Array, Array | None]"


def write_xai(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    overwrite: bool = False,
) -> None:
    """Writes `config.json` and `ckpt-0/tensorNNNNN_000` from (name, (weight, scales or None)), in any order.

    Weights are in the release's (in, out) layout, under the names of `layout(config)`. With an iterator only one
    tensor is held at a time. Each file appears whole or not at all. Raises CheckpointError when the configuration
    cannot be said in the reference's keys, for a tensor that is unknown, repeated, missing or of the wrong shape or
    type, and, without `overwrite`, when the folder already holds tensors: two models must not mix.
    """
    folder = Path(folder)
    target = folder / "ckpt-0"
    specs = {spec.name: spec for spec in layout(config)}
    text = json.dumps(reference_config(config), indent=1) + "\n"
    old = sorted(target.glob("tensor*"))
    if old and not overwrite:
        raise CheckpointError(f"{target}: expected no tensors yet, found {len(old)}, the first of them {old[0].name}")
    for file in old:
        file.unlink()
    target.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "config.json", text)
    missing = dict(specs)
    for name, (weight, scales) in tensors.items() if isinstance(tensors, Mapping) else tensors:
        spec = missing.pop(name, None)
        if spec is None:
            found = "a second one" if name in specs else "an unknown name"
            raise CheckpointError(f"{name!r}: expected each tensor of the layout once, found {found}")
        scales_shape, scales_dtype = (None, None) if scales is None else (scales.shape, scales.dtype)
        problems = tuple(spec.problems(weight.shape, weight.dtype, scales_shape, scales_dtype))
        problems += tuple(
            f"{name}: expected little-endian numbers, found {a.dtype.str}"
            for a in (weight, scales)
            if a is not None and not _little_endian(a.dtype)
        )
        if problems:
            raise CheckpointError("; ".join(problems), problems)
        write_pickle(target / spec.file, weight, scales)
    if missing:
        problems = tuple(f"{spec.file} ({name}): expected a tensor, found none" for name, spec in missing.items())
        raise CheckpointError("\n  ".join([f"{target} is incomplete:", *problems]), problems)


def reference_config(config: ModelConfig) -> dict[str, Any]:
    """`config` in the key names of xAI's reference code. Raises CheckpointError when they cannot express it."""
    c = config
    values = {
        "vocab_size": c.vocab_size,
        "pad_token": 0,
        "eos_token": c.eos_token_ids[0] if c.eos_token_ids else 0,
        "sequence_len": c.max_position,
        "embedding_init_scale": 1.0,
        "output_multiplier_scale": c.output_multiplier,
        "embedding_multiplier_scale": c.embedding_multiplier,
        "model": {
            "emb_size": c.d_model,
            "widening_factor": _widening_factor(c.d_ff, c.d_model),
            "key_size": c.head_dim,
            "num_q_heads": c.num_heads,
            "num_kv_heads": c.num_kv_heads,
            "num_layers": c.num_layers,
            "attn_output_multiplier": c.attn_scale,
            "shard_activations": True,
            "num_experts": c.num_experts,
            "num_selected_experts": c.num_experts_per_tok,
            "data_axis": "data",
            "model_axis": "model",
        },
    }
    # Read back as a user would: what the keys do not carry comes back as Grok-1's own value.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        try:
            back = ModelConfig.from_pretrained(folder)
        except ConfigError as error:
            raise CheckpointError(f"model {c.name!r}: the reference's keys cannot express it: {error}") from None
    lost = tuple(
        f"{f.name}={getattr(c, f.name)!r} would come back as {getattr(back, f.name)!r}"
        for f in fields(c)
        if f.name != "name" and getattr(c, f.name) != getattr(back, f.name)
    )
    if lost:
        raise CheckpointError(f"model {c.name!r}: the reference's keys cannot express it: {'; '.join(lost)}", lost)
    return values


def _widening_factor(d_ff: int, d_model: int) -> float:
    """A factor for which the reference arrives at exactly this width; a whole number where there is one."""
    widened = -(-d_ff * 3 // 2)
    whole = [widened // d_model, widened // d_model + 1]
    # Half a unit above each whole product, so that its floating point error cannot cross one.
    for factor in [*whole, *((widened - back + 0.5) / d_model for back in range(12))]:
        if ffn_width(factor, d_model) == d_ff:
            return factor
    raise CheckpointError(f"d_ff={d_ff}: expected a multiple of 8, as the reference rounds up to one")


def _little_endian(dtype: np.dtype[Any]) -> bool:
    return bool(dtype == dtype.newbyteorder("<"))


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
