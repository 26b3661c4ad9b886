"""The families of models. A family is data: a file here (`Family`), and its name in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grok_engine.config import ConfigError, ModelConfig

from .base import Family
from .grok import parse_reference
from .grok_hf import GROK
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .params import has_experts, in_keys_of_transformers, is_params

FAMILIES: tuple[Family, ...] = (GROK, MIXTRAL, MISTRAL, LLAMA)

PRESETS: dict[str, ModelConfig] = {config.name: config for family in FAMILIES for config in family.presets}


def preset(name: str) -> ModelConfig:
    """A published architecture by name, one of `PRESETS`. ConfigError for any other name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def family_of(values: Mapping[str, Any]) -> Family | None:
    """The family of a `config.json` in the keys of transformers, or of a `params.json`; None for other keys.

    ConfigError for an architecture that is not served.
    """
    if is_params(values):
        return MIXTRAL if has_experts(values) else MISTRAL
    architectures, model_type = values.get("architectures"), values.get("model_type")
    if "model" in values or (architectures is None and model_type is None):
        return None
    named = architectures[0] if architectures and isinstance(architectures, list) else None
    by_name = [family for family in FAMILIES if named in family.architectures]
    by_type = [family for family in FAMILIES if model_type in family.model_types]
    if by_name and by_type and by_name != by_type:
        raise ConfigError(f"architectures={architectures!r} and model_type={model_type!r} name two families")
    if found := by_type if named is None else by_name:
        return found[0]
    raise ConfigError(
        f"architecture {(architectures or model_type)!r} is not served: expected one of "
        f"{', '.join(name for family in FAMILIES for name in family.architectures)}"
    )


def parse_config(values: Mapping[str, Any], name: str) -> ModelConfig:
    """The architecture that the values of a `config.json` describe: in the keys of transformers, of Mistral's
    `params.json`, of xAI's reference code or of `ModelConfig`.

    name: of the model, where the values carry none. ConfigError for keys and values that do not fit.
    """
    if (family := family_of(values)) is not None:
        return family.parse(in_keys_of_transformers(values) if is_params(values) else values, name)
    return parse_reference(values, name) if "model" in values else ModelConfig.from_dict(values)
