"""The `quantization_config` of what is written: 8 or 4 bits, symmetric, in the keys of compressed-tensors, or of
DeepSeek's fp8 for e4m3 in blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BITS = {"int8": 8, "int4": 4}  # of the integers


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one matrix is stored. block: the rows and columns that share a scale; 0 is all columns."""

    format: str  # "int8", "int4" or "fp8_e4m3"
    block: tuple[int, int] = (1, 0)

    @property
    def scale(self) -> str:
        """What stands for `weight` in the name of the scales."""
        return "weight_scale_inv" if self.block[0] > 1 else "weight_scale"

    @property
    def container(self) -> str:
        """Integers without rounded activations are "packed" into int32, as vLLM and transformers load them."""
        return "pack-quantized" if self.format in BITS else "float-quantized"

    def weights(self) -> dict[str, Any]:
        """The arguments of a config group."""
        strategy = "group" if self.block[1] else "channel"
        return {
            "num_bits": BITS.get(self.format, 8),
            "type": "int" if self.format in BITS else "float",
            "symmetric": True,
            "dynamic": False,
            "strategy": strategy,
            "group_size": self.block[1] if strategy == "group" else None,
        }

    def activations(self) -> dict[str, Any] | None:
        """e4m3 rounds each token's activations too, where a server follows the file: vLLM has no other kernel for
        experts."""
        if self.format in BITS:
            return None
        args = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
        if not self.block[1]:
            return {**args, "strategy": "token", "group_size": None}
        return {**args, "strategy": "group", "group_size": self.block[1]}


def quantization_config(schemes: Mapping[str, Mapping[str, Scheme | None]]) -> dict[str, Any] | None:
    """schemes: by the template of a module's name, by module; None for one that is in floats. None if all are.

    One scheme for all is a group of every Linear; of several, each names its modules: by a pattern where all that come
    from one template agree.
    """
    found = list(dict.fromkeys(s for modules in schemes.values() for s in modules.values() if s is not None))
    if not found:
        return None
    blocks = [scheme.block for scheme in found if scheme.block[0] > 1]
    if blocks:
        assert len(found) == 1, found
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": list(blocks[0]),
            "activation_scheme": "dynamic",
            "modules_to_not_convert": [n for modules in schemes.values() for n, s in modules.items() if s is None],
        }
    ignored = [name for modules in schemes.values() for name, scheme in modules.items() if scheme is None]
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(found) == 1 else _targets(schemes, scheme),
            "weights": scheme.weights(),
            "input_activations": scheme.activations(),
            "output_activations": None,
            "format": scheme.container,
        }
        for i, scheme in enumerate(found)
    }
    containers = {scheme.container for scheme in found}
    return {
        "quant_method": "compressed-tensors",
        "format": containers.pop() if len(containers) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(schemes: Mapping[str, Mapping[str, Scheme | None]], wanted: Scheme) -> Sequence[str]:
    targets: list[str] = []
    for template, modules in schemes.items():
        if set(modules.values()) == {wanted}:
            pattern = re.escape(template).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"\d+")
            targets.append(f"re:{pattern}$")
        else:
            targets += [name for name, scheme in modules.items() if scheme == wanted]
    return targets
