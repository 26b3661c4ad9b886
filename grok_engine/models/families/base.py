"""What a family consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grok_engine.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that differ in sizes alone: one file of `families`.

    parse: from the values of a `config.json` and a name for the model to its architecture, or None where the keys are
    not this family's; a family without a parser is read in `ModelConfig`'s own keys.
    """

    presets: tuple[ModelConfig, ...]
    parse: Callable[[Mapping[str, Any], str], ModelConfig | None] | None = None
