"""From a GGUF file's metadata to the architecture.

Keys that an architecture does not have here are an error, since each may change what the model computes. The values
that say "as usual" are let through (`_NEUTRAL`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from itertools import zip_longest
from typing import Any

from grok_engine.checkpoint.base import CheckpointError, all_problems
from grok_engine.config import ConfigError, ModelConfig, is_int, is_number
from grok_engine.models.families import preset
from grok_engine.models.families.rope import rope_fields

from .header import Header, Place

MAX_CONTEXT = 1 << 24
# What these keys may hold without changing the model; None is anything.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "interleave_moe_layer_step": (1,),
    "leading_dense_block_count": (0,),
    "pooling_type": (0,),
    "rope.scaling.finetuned": None,
    "rope.scaling.original_context_length": None,
    "tensor_data_layout": None,
    "use_parallel_residual": (False,),
}
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("an integer of 0 or more", lambda value: is_int(value) and value >= 0),
    "float": ("a number", is_number),
    "bool": ("a boolean", lambda value: isinstance(value, bool)),
    "str": ("a string", lambda value: isinstance(value, str)),
}


class _Keys:
    """Reads keys by kind, and collects what is wrong with them; `prefix` is the architecture's."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self._metadata, self._prefix = metadata, prefix
        self._read: set[str] = set()
        self.problems: list[str] = []

    def get(self, key: str, kind: str, default: Any = None, *, required: bool = False) -> Any:
        """The value of `prefix`.`key`, or the default. An array of one value a layer counts where all are equal."""
        return self._value(f"{self._prefix}.{key}", kind, default, required)

    def outer(self, key: str, kind: str, default: Any = None) -> Any:
        """The same for a key without the prefix."""
        return self._value(key, kind, default, False)

    def _value(self, key: str, kind: str, default: Any, required: bool) -> Any:
        self._read.add(key)
        value = self._metadata.get(key)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value is None:
            if required:
                self.problems.append(f"key {key!r} is missing")
            return default
        what, fits = _KINDS[kind]
        if not fits(value):
            self.problems.append(f"{key}={value if not isinstance(value, tuple) else list(value[:8])!r} is not {what}")
            return default
        return value

    def unknown(self) -> list[str]:
        """One line for each key of the architecture that was not read and is not neutral, and for each misspelt key: a
        typo must not become a default."""
        found, absent = [], [key for key in self._read if key not in self._metadata]
        for key, value in self._metadata.items():
            name = key.removeprefix(f"{self._prefix}.")
            if key in self._read:
                continue
            if name == key:
                if f"{self._prefix}.{key.partition('.')[2]}" in self._read:
                    found.append(f"{key} does not begin with the architecture {self._prefix}: not served")
                elif key != "tokenizer.ggml.mask_token_id" and (near := get_close_matches(key, absent, 1, 0.9)):
                    found.append(f"unknown key {key!r}: expected {near[0]!r}")
                continue
            neutral = _NEUTRAL.get(name, ())
            if neutral is not None and value not in neutral:
                found.append(f"{key}={str(value)[:80]} is not served")
        return found


def parse_metadata(header: Header, tensors: Mapping[str, Place], factors: Sequence[float] = ()) -> ModelConfig:
    """The architecture of a file, or of a split one: the first file's header, and the tensors of all. factors: of
    `rope_freqs.weight`, which divide the rotary frequencies.

    CheckpointError with everything that is wrong in the metadata, or does not agree with the tensors.
    """
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        raise CheckpointError(
            f"{header.path}: general.architecture is {arch!r}, expected one of {', '.join(_ARCHITECTURES)}"
        )
    keys = _Keys(header.metadata, arch)
    if (kind := keys.outer("general.type", "str", "model")) != "model":
        keys.problems.append(f"general.type is {kind!r}, expected 'model'")
    if (version := keys.outer("general.quantization_version", "int", 2)) != 2:
        keys.problems.append(f"general.quantization_version is {version}, expected 2")
    common = _common(keys, tensors)
    fields = common | _ARCHITECTURES[arch](keys, common, tensors)
    if factors:
        fields["rope_factors"] = tuple(
            a * b for a, b in zip_longest(factors, fields.get("rope_factors", ()), fillvalue=1.0)
        )
    fields["name"] = keys.outer("general.name", "str") or header.path.stem
    problems = keys.problems + keys.unknown()
    if not problems:
        problems = _disagreements(fields, tensors)
    if not problems:
        try:
            return ModelConfig(**fields)
        except ConfigError as error:
            problems = [str(error)]
    raise all_problems(f"{header.path}: the metadata does not fit:", problems)


def _common(keys: _Keys, tensors: Mapping[str, Place]) -> dict[str, Any]:
    d_model = keys.get("embedding_length", "int", 0, required=True)
    heads = keys.get("attention.head_count", "int", 0, required=True)
    head_dim = keys.get("attention.key_length", "int", d_model // heads if heads else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := keys.get(key, "int", head_dim)) != head_dim:
            keys.problems.append(f"{key}={found} differs from the size of a head, {head_dim}: not served")
    embed = tensors.get("token_embd.weight")
    bos, eos = (1, 2) if keys.outer("tokenizer.ggml.model", "str") == "llama" else (None, None)
    stops = [keys.outer("tokenizer.ggml.eos_token_id", "int", eos)]
    stops += [keys.outer(f"tokenizer.ggml.{kind}_token_id", "int") for kind in ("eot", "eom")]
    return {
        "vocab_size": keys.get("vocab_size", "int", 0 if embed is None else embed.shape[0]),
        "d_model": d_model,
        "num_layers": keys.get("block_count", "int", 0, required=True),
        "num_heads": heads,
        "num_kv_heads": keys.get("attention.head_count_kv", "int", heads),
        "head_dim": head_dim,
        "num_experts": keys.get("expert_count", "int", 0),
        "num_experts_per_tok": keys.get("expert_used_count", "int", 0),
        "norm_eps": keys.get("attention.layer_norm_rms_epsilon", "float", 0.0, required=True),
        "rope_theta": keys.get("rope.freq_base", "float", 1e4),
        "max_position": keys.get("context_length", "int", 0, required=True),
        "sliding_window": keys.get("attention.sliding_window", "int", 0),
        "tie_embeddings": "output.weight" not in tensors,
        "bos_token_id": keys.outer("tokenizer.ggml.bos_token_id", "int", bos),
        "eos_token_ids": tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
    }


def _llama(keys: _Keys, common: Mapping[str, Any], tensors: Mapping[str, Place]) -> dict[str, Any]:
    width = keys.get("feed_forward_length", "int", 0, required=True)
    fields = {"activation": "silu", "post_norms": False, **_rope(keys, common)}
    if not common["num_experts"]:
        return fields | {"dense_d_ff": width, "num_experts_per_tok": 0}
    return fields | {
        "d_ff": keys.get("expert_feed_forward_length", "int", width),
        "renormalize": keys.get("expert_weights_norm", "bool", True),
    }


def _rope(keys: _Keys, common: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary scaling, as the keys of transformers have it, and the scale of the scores."""
    kind = keys.get("rope.scaling.type", "str", "none")
    if kind not in (served := ("none", "linear", "yarn")):
        keys.problems.append(f"rope.scaling.type={kind!r} is not served, expected one of {', '.join(served)}")
    values = {
        "rope_theta": common["rope_theta"],
        "rope_type": kind if kind in served[1:] else "default",
        "factor": keys.get("rope.scaling.factor", "float", 1.0),
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length", "int"),
    }
    context, head_dim = common["max_position"], common["head_dim"]
    fields, attention = rope_fields({"rope_parameters": values}, 1e4, head_dim, context, keys.problems)
    scale = keys.get("attention.scale", "float", head_dim**-0.5 if head_dim else 0.0)
    return {**fields, "attn_scale": scale * attention**2}


def _grok(keys: _Keys, common: Mapping[str, Any], tensors: Mapping[str, Place]) -> dict[str, Any]:
    width = keys.get("feed_forward_length", "int", 0, required=True)
    dense = "blk.0.ffn_up.weight" in tensors  # beside the experts, as Grok-2 has it
    # Grok-2's rope type "original" does not change the frequencies; llama.cpp's converter writes it as yarn.
    if (kind := keys.get("rope.scaling.type", "str", "none")) not in ("none", "yarn"):
        keys.problems.append(f"rope.scaling.type={kind!r} is not served, expected 'none' or 'yarn'")
    for key in ("factor", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"):
        keys.get(f"rope.scaling.{key}", "float")
    names = {
        "attn_softcap": "attn_logit_softcapping",
        "router_softcap": "router_logit_softcapping",
        "final_softcap": "final_logit_softcapping",
        "embedding_multiplier": "embedding_scale",
        "output_multiplier": "logit_scale",
        "attn_scale": "attention.output_scale",
    }
    default = preset("grok-1")  # the first converters wrote none of these keys
    fields = {field: keys.get(key, "float", getattr(default, field)) for field, key in names.items()}
    if not dense and fields["router_softcap"] == 30:  # the converter's default; Grok-1 has none, nor does llama.cpp cap
        fields["router_softcap"] = 0.0
    return {
        **fields,
        "attn_temperature_len": keys.get("attention.temperature_length", "int", 0),
        "d_ff": keys.get("expert_feed_forward_length", "int", width),
        "dense_d_ff": width if dense else 0,
        "activation": "gelu" if dense else "gelu_tanh",
        "renormalize": keys.get("expert_weights_norm", "bool", False),
    }


def _disagreements(fields: Mapping[str, Any], tensors: Mapping[str, Place]) -> list[str]:
    """What the metadata says that the tensors do not bear out, as far as a model of that size must not be built."""
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    problems = []
    if layers != set(map(str, range(min(fields["num_layers"], len(layers) + 1)))):
        problems.append(f"block_count={fields['num_layers']}, found tensors of {len(layers)} blocks")
    if (context := fields["max_position"]) > MAX_CONTEXT:
        problems.append(f"context_length={context}, expected at most {MAX_CONTEXT}")
    q, rows = tensors.get("blk.0.attn_q.weight"), fields["num_heads"] * fields["head_dim"]
    if q is not None and q.shape != (rows, fields["d_model"]):
        problems.append(f"blk.0.attn_q.weight has shape {q.shape}, expected {(rows, fields['d_model'])}")
    return problems


_ARCHITECTURES: dict[str, Callable[[_Keys, Mapping[str, Any], Mapping[str, Place]], dict[str, Any]]] = {
    "llama": _llama,
    "grok": _grok,
}
