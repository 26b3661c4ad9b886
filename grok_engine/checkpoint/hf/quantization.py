"""What the `quantization_config` of a `config.json` says about the tensors.

AutoFP8 and the blocks of DeepSeek both say quant_method "fp8", Llama 3.1 "fbgemm_fp8", llm-compressor
"compressed-tensors", AutoGPTQ and GPTQModel "gptq", AutoAWQ "awq". A matrix that is left in floats is found as such by
its name and type, so lists of modules that are not quantised say nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grok_engine.checkpoint.strict_json import read_object
from grok_engine.config import is_int, shown

from .integers import Packing

SERVED = "fp8, fbgemm_fp8, compressed-tensors, gptq or awq"
# Beside config.json, of tools that do not write into it: the file, and its method.
_OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """Values of one dtype, of which `block` (rows, columns) share a scale; 0 is all of them."""

    code: str  # the values' dtype, as safetensors names it
    block: tuple[int, int]
    scale: str = "weight_scale"  # stands for `weight` in the name of the scales
    symmetric: bool = True

    def block_of(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
        """The block of a matrix (N, K) with scales of this shape; None where the scheme expects another shape."""
        n, k = shape
        rows, columns = min(self.block[0] or n, n), min(self.block[1] or k, k)
        expected = (-(-n // rows), -(-k // columns))
        flat = math.prod(scales) == math.prod(expected) and expected[1] == 1 and len(scales) < 2
        return (rows, columns) if scales == expected or flat else None


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a tensor of the checkpoint may be. ignored: what the file says that changes nothing here, for a warning."""

    schemes: tuple[Scheme, ...] = ()
    packings: tuple[Packing, ...] = ()
    ignored: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.schemes or self.packings)


def quantization_of(values: Mapping[str, Any], folder: Path, problems: list[str]) -> Quantization:
    """By the values of a `config.json`, or by the file that an old tool wrote beside it. What is not served is added to
    `problems`."""
    found = values.get("quantization_config") or values.get("compression_config")  # as old tools wrote it
    for file, tool in _OLD_FILES.items():
        if found is None and (folder / file).exists():
            found = {"quant_method": tool, **read_object(folder / file)}
    if found is None:
        return Quantization()
    if not isinstance(found, dict):
        problems.append(f"quantization_config={shown(found)} is not an object")
        return Quantization()
    method = found.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return Quantization(schemes=_fp8(found, problems))
    if method in ("gptq", "awq"):
        packing = (_gptq if method == "gptq" else _awq)(found, problems)
        return Quantization(packings=(packing,) if packing else ())
    if method == "compressed-tensors":
        return _compressed_tensors(found, problems)
    problems.append(f"quantisation {shown(method)} is not served: expected {SERVED}")
    return Quantization()


def _fp8(values: Mapping[str, Any], problems: list[str]) -> tuple[Scheme, ...]:
    if (fmt := values.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        problems.append(f"quantisation fp8 with fmt={shown(fmt)} is not served: expected 'e4m3'")
    if (block := values.get("weight_block_size")) is None:
        # per tensor or per channel; transformers and Mistral name the scale as DeepSeek does
        names, blocks = ("weight_scale", "weight_scale_inv"), ((0, 0), (1, 0))
        return tuple(Scheme("F8_E4M3", block, name) for name in names for block in blocks)
    return tuple(Scheme("F8_E4M3", pair, "weight_scale_inv") for pair in _pair("weight_block_size", block, problems))


def _gptq(values: Mapping[str, Any], problems: list[str]) -> Packing | None:
    """Of AutoGPTQ, optimum and GPTQModel. `desc_act` says that g_idx may be out of order, and g_idx tells."""
    version: Any = values.get("checkpoint_format", values.get("format")) or "gptq"
    if version not in ("gptq", "gptq_v2"):
        problems.append(f"gptq with checkpoint_format={shown(version)} is not served: expected 'gptq' or 'gptq_v2'")
    if values.get("is_marlin_format"):
        problems.append("gptq with is_marlin_format=true is not served: expected the format of AutoGPTQ")
    for name, change in _rules(values.get("dynamic")):
        if not name.startswith("-:") and change:
            problems.append(f"gptq with dynamic rule {shown(name)}: {shown(change)} is not served: expected one format")
    packed = str(values.get("pack_dtype") or "int32").removeprefix("torch.")
    if packed != "int32":
        problems.append(f"gptq with pack_dtype={packed!r} is not served: expected 'int32'")
    found = _packing("GPTQ", values, (4, 8), values.get("sym", True), problems)
    return Packing(*found, shift=int(version == "gptq")) if found else None


def _rules(dynamic: Any) -> list[tuple[str, Any]]:
    if not dynamic:
        return []
    return list(dynamic.items()) if isinstance(dynamic, dict) else [("", dynamic)]


def _awq(values: Mapping[str, Any], problems: list[str]) -> Packing | None:
    version = str(values.get("version", values.get("format", values.get("checkpoint_format"))) or "gemm").lower()
    if version != "gemm" or values.get("backend") == "llm-awq":
        what = f"version={version!r}" if version != "gemm" else "backend='llm-awq'"
        problems.append(f"awq with {what} is not served: expected 'gemm'")
    found = _packing("AWQ", values, (4,), values.get("zero_point", True) is False, problems)
    return Packing(*found) if found else None


def _packing(
    tool: str, values: Mapping[str, Any], served: tuple[int, ...], symmetric: Any, problems: list[str]
) -> tuple[str, int, int, bool] | None:
    """The fields of a Packing; group_size −1 is all of K."""
    bits = values.get("bits", values.get("w_bit", 4))
    group = values.get("group_size", values.get("q_group_size", 128))
    if bits not in served or not is_int(bits):
        problems.append(f"{tool} with bits={shown(bits)} is not served: expected {' or '.join(map(str, served))}")
        return None
    if not is_int(group) or group < -1 or group == 0:
        problems.append(f"{tool} with group_size={shown(group)}: expected a positive integer, or −1 for whole rows")
        return None
    return tool, bits, max(group, 0), symmetric is True


_CODES = {"float": "F8_E4M3", "int": "I8"}
_FORMATS = (
    "naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "mixed-precision", "dense",
)  # fmt: skip


def _compressed_tensors(values: Mapping[str, Any], problems: list[str]) -> Quantization:
    for key in ("transform_config", "sparsity_config"):
        value = values.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            problems.append(f"compressed-tensors with {key}={shown(value)} is not served: expected none")
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        problems.append(f"compressed-tensors with config_groups={shown(groups)}: expected at least one group")
        return Quantization()
    found: list[Scheme | Packing] = []
    ignored = ["kv_cache_scheme"] if values.get("kv_cache_scheme") else []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            problems.append(f"config_groups.{name} has weights={shown(weights)}: expected an object")
            continue
        ignored += [key for key in ("input_activations", "output_activations") if group.get(key)]
        form = group.get("format") or values.get("format")
        if form is not None and form not in _FORMATS:
            problems.append(f"config_groups.{name} has format={shown(form)}: expected one of {', '.join(_FORMATS)}")
            continue
        found += _group(f"config_groups.{name}", weights, form, problems)
    return Quantization(
        tuple(scheme for scheme in found if isinstance(scheme, Scheme)),
        tuple(packing for packing in found if isinstance(packing, Packing)),
        tuple(dict.fromkeys(ignored)),
    )


def _group(name: str, weights: Mapping[str, Any], form: Any, problems: list[str]) -> list[Scheme | Packing]:
    """What one of the config groups says of its matrices: unpacked, packed, or either where it does not say."""
    kind, bits, symmetric = str(weights.get("type", "int")), weights.get("num_bits", 8), weights.get("symmetric", True)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    whole = is_int(bits)
    packs = whole and kind == "int" and bits in (4, 8) and form in (None, "pack-quantized", "mixed-precision")
    plain = whole and kind in _CODES and bits == 8 and form != "pack-quantized"
    if whole and kind == "int" and 0 < bits < 8 and form in ("naive-quantized", "int-quantized"):
        plain = True  # one in a byte
    if not (packs or plain) or symmetric not in (True, False) or (kind == "float" and not symmetric):
        problems.append(
            f"{name} has weights of {shown(bits)} bits, type={shown(kind)}, symmetric={shown(symmetric)}, "
            f"format={shown(form)}: expected 8 bits, float (symmetric) or int, or 4 bits, int"
        )
        return []
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    pairs = {"tensor": [(0, 0)], "channel": [(1, 0)]}.get(str(strategy))
    if strategy == "group":
        pairs = _pair("group_size", [1, size], problems)
    elif strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, str) and all(part.isdecimal() for part in block.split("x")):  # as old tools wrote it
            block = [int(part[:9]) for part in block.split("x")]
        pairs, packs = _pair("block_structure", block, problems), False
    elif pairs is None:
        problems.append(f"{name} has strategy={shown(strategy)}: expected tensor, channel, group or block")
    found: list[Scheme | Packing] = []
    for pair in pairs or []:
        if plain:
            found.append(Scheme(_CODES[kind], pair, symmetric=symmetric))
        if packs and strategy != "tensor":
            found.append(Packing("compressed-tensors", bits, pair[1], symmetric))
    if not found and pairs:
        problems.append(f"{name} has strategy={shown(strategy)} for packed weights: expected channel or group")
    return found


def _pair(key: str, value: Any, problems: list[str]) -> list[tuple[int, int]]:
    if isinstance(value, list) and len(value) == 2 and all(is_int(n) and n > 0 for n in value):
        return [(value[0], value[1])]
    problems.append(f"{key}={shown(value)}: expected positive integers")
    return []
