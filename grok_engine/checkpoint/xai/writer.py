"""Writes a checkpoint in the format of xAI's open release, so that any reader of that format can load it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.config import ConfigError, ModelConfig
from grok_engine.models.families.grok import parse_reference, reference_values

from .layout import layout
from .pickle_writer import whole_file, write_pickle
from .pickles import Array

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
    with whole_file(folder / "config.json") as out:
        out.write(text.encode())
    missing = dict(specs)
    for name, (weight, scales) in tensors.items() if isinstance(tensors, Mapping) else tensors:
        spec = missing.pop(name, None)
        if spec is None:
            found = "a second one" if name in specs else "an unknown name"
            raise CheckpointError(f"{name!r}: expected each tensor of the layout once, found {found}")
        problems = tuple(spec.problems(weight, scales))
        problems += tuple(
            f"{name}: expected little-endian numbers, found {a.dtype.str}"
            for a in (weight, scales)
            if a is not None and a.dtype != a.dtype.newbyteorder("<")
        )
        if problems:
            raise CheckpointError("; ".join(problems), problems)
        write_pickle(target / spec.file, weight, scales)
    if missing:
        problems = tuple(f"{spec.file} ({name}): expected a tensor, found none" for name, spec in missing.items())
        raise CheckpointError("\n  ".join([f"{target} is incomplete:", *problems]), problems)


def reference_config(config: ModelConfig) -> dict[str, Any]:
    """`config` in the keys of xAI's reference code. CheckpointError where they cannot express it."""
    c = config
    try:
        values = reference_values(c)
        back = parse_reference(values, c.name)
    except ConfigError as error:
        raise CheckpointError(f"model {c.name!r}: the reference's keys cannot express it: {error}") from None
    # What the keys do not carry comes back as Grok-1's own value.
    lost = tuple(
        f"{f.name}={getattr(c, f.name)!r} would come back as {getattr(back, f.name)!r}"
        for f in fields(c)
        if f.name != "name" and getattr(c, f.name) != getattr(back, f.name)
    )
    if lost:
        raise CheckpointError(f"model {c.name!r}: the reference's keys cannot express it: {'; '.join(lost)}", lost)
    return values
