"""What a family consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grok_engine.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Stacked:
    """A tensor that a file holds as one of `parts` equal ranges of rows of another, of all experts at once."""

    name: str
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class Interleaved:
    """A tensor of q or k whose rows pair neighbours 2i and 2i + 1 of a head for rotation, instead of i and i + C/2."""

    name: str


@dataclass(frozen=True, slots=True)
class Flat:
    """A tensor of all experts that a file holds as one matrix (E · N, K), or as (E · K, N) with each transposed."""

    name: str
    transposed: bool = False


# The engine's name of a tensor → a file's. In both, {i} is the layer; in a file's, {e} is the expert, and a tensor of
# experts whose name has no {e} is stored stacked.
Names = Mapping[str, str | Stacked | Interleaved | Flat]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that differ in sizes alone: one file of `families`.

    architectures, model_types: how a `config.json` in the keys of transformers names the family.
    parse: from its values and a name for the model to the architecture. ConfigError for values that do not fit.
    spellings: the ways in which files of the family name their tensors; all tensors of one checkpoint use the same.
    """

    presets: tuple[ModelConfig, ...]
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], str], ModelConfig]
    spellings: tuple[Names, ...]
