"""JSON of files that strangers wrote: bounded in size, without duplicate keys, and with numbers that fit a machine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from .base import CheckpointError

# Of a configuration, an index or a header: what Python makes of it takes up to 20 times as much. The index of a model
# of 50,000 tensors takes 5 MB.
MAX_BYTES = 8 << 20


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError, naming the file, for anything else."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(
                f"{path}: expected a regular file, found {'another kind' if path.exists() else 'none'}"
            )
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None
    if len(text) > max_bytes:
        raise CheckpointError(f"{path}: expected at most {max_bytes:,} bytes of JSON, found more")
    return parse_object(text, str(path))


def parse_object(text: bytes, source: str) -> dict[str, Any]:
    """The JSON object that `text` spells in UTF-8. CheckpointError, beginning with `source`, for anything else."""
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{source} is not valid JSON: {why}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} holds a {type(value).__name__}, expected an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} stands twice in one object")
        values[key] = value
    return values


def _integer(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) >= 1 << 63:
        raise ValueError(f"{text[:24]} is beyond 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:24]} is beyond a double")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")
