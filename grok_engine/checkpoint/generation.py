"""What a checkpoint says about generating text: its `generation_config.json`, or `general.sampling` of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .gguf.files import gguf_file, read_headers
from .strict_json import read_object

FILE = "generation_config.json"
_GGUF = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def read_generation(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a folder or GGUF file that says it, and the values by the names of transformers, without nulls.

    No values where there is no such file. CheckpointError for one that is not a JSON object.
    """
    if (gguf := gguf_file(path)) is not None:
        metadata = read_headers(gguf)[0].metadata
        found = {name: metadata.get(f"general.sampling.{key}") for key, name in _GGUF.items()}
        source = gguf
    else:
        source = Path(path) / FILE
        found = read_object(source) if source.is_symlink() or source.exists() else {}
    return source, {name: _shortest(value) for name, value in found.items() if value is not None}


def generation_files(path: str | Path) -> dict[str, bytes]:
    """What a folder needs to say the same, by name."""
    source, values = read_generation(path)
    if not values:
        return {}
    return {FILE: source.read_bytes() if source.name == FILE else json.dumps(values, indent=1).encode()}


def generation_metadata(path: str | Path) -> dict[str, Any]:
    """The keys with which a GGUF file says the same; token ids have keys of their own."""
    _, values = read_generation(path)
    if values.get("do_sample") is False:
        values["temperature"] = 0
    found = {key: values[name] for key, name in _GGUF.items() if type(values.get(name)) in (int, float)}
    return {f"general.sampling.{key}": int(value) if key == "top_k" else float(value) for key, value in found.items()}


def _shortest(value: Any) -> Any:
    """A number that fp32 holds with the digits that its writer meant: 0.6, not 0.6000000238."""
    exact = isinstance(value, float) and np.float32(value) == value
    return float(str(np.float32(value))) if exact else value
