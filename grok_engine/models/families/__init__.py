"""The families of models. A family is data: a file here (`Family`), and its name in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grok_engine.config import ConfigError, ModelConfig

from .base import Family
from .grok import GROK
from .mistral import MISTRAL
from .mixtral import MIXTRAL

FAMILIES: tuple[Family, ...] = (GROK, MIXTRAL, MISTRAL)

PRESETS: dict[str, ModelConfig] = {config.name: config for family in FAMILIES for config in family.presets}


def preset(name: str) -> ModelConfig:
    """A published architecture by name, one of `PRESETS`. ConfigError for any other name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def parse_config(values: Mapping[str, Any], name: str) -> ModelConfig:
    """The architecture that the values of a `config.json` describe, in a family's keys or in `ModelConfig`'s own.

    name: of the model, where the values carry none. ConfigError for keys and values that do not fit.
    """
    for family in FAMILIES:
        if family.parse is not None and (config := family.parse(values, name)) is not None:
            return config
    return ModelConfig.from_dict(values)
