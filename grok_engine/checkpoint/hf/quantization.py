"""What the `quantization_config` of a `config.json` says about the tensors: 8 bits, with scales beside the values.

AutoFP8 and the blocks of DeepSeek both say quant_method "fp8", Llama 3.1 "fbgemm_fp8", llm-compressor
"compressed-tensors". What they say about activations is ignored: those are not quantised unless the engine is asked to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grok_engine.config import is_int

SERVED = "fp8, fbgemm_fp8 and compressed-tensors (8 bits, symmetric)"
# Of activations, keys and values.
IGNORED = (".input_scale", ".input_scale_ub", ".output_scale", ".k_scale", ".v_scale")
_CODES = {"float": "F8_E4M3", "int": "I8"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """Values of one dtype, of which `block` (rows, columns) share a scale; 0 is all of them."""

    code: str  # the values' dtype, as safetensors names it
    block: tuple[int, int]
    scale: str = "weight_scale"  # stands for `weight` in the name of the scales

    def block_of(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
        """The block of a matrix (N, K) with scales of this shape; None where the scheme expects another shape."""
        n, k = shape
        rows, columns = min(self.block[0] or n, n), min(self.block[1] or k, k)
        expected = (-(-n // rows), -(-k // columns))
        flat = math.prod(scales) == math.prod(expected) and expected[1] == 1 and len(scales) < 2
        return (rows, columns) if scales == expected or flat else None


def schemes_of(values: Any, problems: list[str]) -> tuple[Scheme, ...]:
    """The schemes that tensors of the checkpoint may follow; what is not served is added to `problems`."""
    if values is None:
        return ()
    if not isinstance(values, dict):
        problems.append(f"quantization_config={values!r} is not an object")
        return ()
    method = values.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return _fp8(values, problems)
    if method == "compressed-tensors":
        return _compressed_tensors(values, problems)
    problems.append(f"quantisation {method!r} is not served: expected {SERVED}")
    return ()


def _fp8(values: Mapping[str, Any], problems: list[str]) -> tuple[Scheme, ...]:
    if (fmt := values.get("fmt", "e4m3")) != "e4m3":
        problems.append(f"quantisation fp8 with fmt={fmt!r} is not served: expected 'e4m3'")
    if (block := values.get("weight_block_size")) is None:
        return Scheme("F8_E4M3", (0, 0)), Scheme("F8_E4M3", (1, 0))
    return tuple(Scheme("F8_E4M3", pair, "weight_scale_inv") for pair in _pair("weight_block_size", block, problems))


def _compressed_tensors(values: Mapping[str, Any], problems: list[str]) -> tuple[Scheme, ...]:
    found: list[Scheme] = []
    for key in ("transform_config", "sparsity_config"):
        value = values.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            problems.append(f"compressed-tensors with {key}={value!r} is not served: expected none")
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        problems.append(f"compressed-tensors with config_groups={groups!r}: expected at least one group")
        return ()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            problems.append(f"config_groups.{name} has weights={weights!r}: expected an object")
            continue
        kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("strategy", "tensor")
        if bits != 8 or kind not in _CODES or weights.get("symmetric", True) is not True:
            problems.append(
                f"config_groups.{name} has weights of {bits!r} bits, type={kind!r}, symmetric="
                f"{weights.get('symmetric', True)!r}: expected 8 bits, float or int, symmetric"
            )
        elif strategy in ("tensor", "channel"):
            found.append(Scheme(_CODES[kind], (0, 0) if strategy == "tensor" else (1, 0)))
        elif strategy == "group":
            sizes = _pair("group_size", [1, weights.get("group_size")], problems)
            found += [Scheme(_CODES[kind], pair) for pair in sizes]
        elif strategy == "block":
            sizes = _pair("block_structure", weights.get("block_structure"), problems)
            found += [Scheme(_CODES[kind], pair) for pair in sizes]
        else:
            problems.append(f"config_groups.{name} has strategy={strategy!r}: expected tensor, channel, group or block")
    return tuple(found)


def _pair(key: str, value: Any, problems: list[str]) -> list[tuple[int, int]]:
    if isinstance(value, list) and len(value) == 2 and all(is_int(n) and n > 0 for n in value):
        return [(value[0], value[1])]
    problems.append(f"{key}={value!r}: expected positive integers")
    return []
