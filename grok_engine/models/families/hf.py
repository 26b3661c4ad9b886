"""Reads a `config.json` in the keys of transformers, 4.3x and 5.x, and names tensors as its Llama code does."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from grok_engine.config import Activation, ConfigError, ModelConfig, is_int, is_number

from .rope import rope_fields

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# What the code of these families reads, besides a family's defaults. Other keys change nothing there and are ignored.
_READ = ("attention_bias", "mlp_bias", "rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor",
         "original_max_position_embeddings", "layer_types", "quantization_config", "architectures", "model_type",
         "torch_dtype", "pad_token_id", "initializer_range")  # fmt: skip
MAX_KEYS = 1000


class HfKeys:
    """The values of a `config.json`: read by key, with a family's defaults, and what is wrong with them collected."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.values, self.defaults = values, defaults
        self.problems: list[str] = []
        known = {*defaults, *_READ}
        if len(values) > MAX_KEYS:
            raise ConfigError(f"{len(values)} keys, expected at most {MAX_KEYS}")
        for key in values.keys() - known:
            if near := difflib.get_close_matches(key, known, 1, 0.9):  # a typo must not become a default
                self.problems.append(f"unknown key {key!r}: expected {near[0]!r}")

    def get(self, key: str) -> Any:
        """The value, or the default for an absent one; null is None."""
        return self.values[key] if key in self.values else self.defaults[key]

    def integer(self, key: str, null: int | None = None) -> int:
        """null: what null stands for; None where it is an error."""
        value: int = self._checked(key, null, is_int, "an integer")
        return value

    def number(self, key: str) -> float:
        value: float = self._checked(key, None, is_number, "a number")
        return value

    def flag(self, key: str) -> bool:
        """null is false."""
        value: bool = self._checked(key, False, lambda value: isinstance(value, bool), "true or false")
        return value

    def token(self, key: str) -> int | None:
        return None if self.get(key) is None else self.integer(key)

    def tokens(self, key: str) -> tuple[int, ...]:
        """One token, a list of them, or null for none."""
        value = self.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(is_int, found)):
            self.problems.append(f"{key}={value!r} is not an integer, a list of integers or null")
            return ()
        return tuple(found)

    def activation(self, key: str = "hidden_act") -> Activation:
        name = self.get(key)
        if isinstance(name, str) and name in ACTIVATIONS:
            return ACTIVATIONS[name]
        self.problems.append(f"{key}={name!r} is not served, expected one of {', '.join(ACTIVATIONS)}")
        return "silu"

    def unserved(self, key: str, *plain: Any) -> None:
        """A problem unless the key is absent, null, or has one of these values, which change nothing."""
        if (value := self.values.get(key)) is not None and value not in plain:
            self.problems.append(f"{key}={value!r} is not served, expected {' or '.join(map(repr, plain)) or 'null'}")

    def build(self, **fields: Any) -> ModelConfig:
        """The architecture. ConfigError with all problems."""
        if not self.problems:
            return ModelConfig(**fields)
        try:
            ModelConfig(**fields)
        except ConfigError as error:
            self.problems.append(str(error))
        raise ConfigError("; ".join(self.problems))

    def _checked(self, key: str, null: Any, fits: Callable[[Any], bool], what: str) -> Any:
        value = self.get(key)
        if value is None and null is not None:
            return null
        if fits(value):
            return value
        self.problems.append(f"{key}={value!r} is not {what}")
        return self.defaults[key] if self.defaults[key] is not None else 1


def llama_fields(keys: HfKeys) -> dict[str, Any]:
    """The fields that all families of Llama's code share, its feed-forward block apart."""
    for key in ("attention_bias", "mlp_bias"):
        keys.unserved(key, False)
    layer_types = keys.values.get("layer_types")
    if isinstance(layer_types, list) and len(set(map(str, layer_types))) > 1:
        keys.problems.append(f"layer_types={layer_types!r}: layers of several types are not served")
    d, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", null=d // max(heads, 1))
    window = keys.integer("sliding_window", null=0) if "sliding_window" in keys.defaults else 0
    max_position = keys.integer("max_position_embeddings")
    rope, attention_factor = rope_fields(
        keys.values, keys.defaults["rope_theta"], head_dim, max_position, keys.problems
    )
    return {
        "vocab_size": keys.integer("vocab_size"),
        "d_model": d,
        "num_layers": keys.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": keys.integer("num_key_value_heads", null=heads),
        "head_dim": head_dim,
        "activation": keys.activation(),
        "post_norms": False,
        "attn_scale": max(head_dim, 1) ** -0.5 * attention_factor**2,
        **rope,
        "sliding_window": window,
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "norm_eps": keys.number("rms_norm_eps"),
        "max_position": max_position,
        "bos_token_id": keys.token("bos_token_id"),
        "eos_token_ids": keys.tokens("eos_token_id"),
    }


# Defaults that all these families share.
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ATTENTION_NAMES = {
    f"layers.{{i}}.attn.{name}": f"model.layers.{{i}}.self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")
}
MLP_NAMES = {
    f"layers.{{i}}.mlp.{name}": f"model.layers.{{i}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
}
# Of a decoder in Llama's code without its feed-forward block.
DECODER_NAMES = {
    "embed": "model.embed_tokens.weight",
    **ATTENTION_NAMES,
    "layers.{i}.norm.pre_attn": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.norm.pre_moe": "model.layers.{i}.post_attention_layernorm.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
