"""The findings of an inspection, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from grok_engine.checkpoint.xai.reader import TensorInfo
from grok_engine.config import ModelConfig

from .verify import Stats


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor. `weight` and `scales` are there only after verification."""

    info: TensorInfo
    scale_layout: str | None
    weight: Stats | None = None
    scales: Stats | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The findings. Bytes by kind sum to `total_bytes`, those by dtype to the same without the files' headers."""

    path: str
    config: ModelConfig
    parameters: int
    active_parameters: int
    total_bytes: int
    bytes_by_kind: dict[str, int]
    bytes_by_dtype: dict[str, int]
    tensors: tuple[TensorReport, ...]
    verified: bool
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {
            "path": self.path,
            "ok": self.ok,
            "verified": self.verified,
            "problems": list(self.problems),
            "architecture": self.config.to_dict() | {"eos_token_ids": list(self.config.eos_token_ids)},
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "files": len(self.tensors),
            "total_bytes": self.total_bytes,
            "bytes_by_kind": dict(self.bytes_by_kind),
            "bytes_by_dtype": dict(self.bytes_by_dtype),
            "tensors": [_tensor_dict(t) for t in self.tensors],
        }


def _tensor_dict(tensor: TensorReport) -> dict[str, Any]:
    info = tensor.info
    return {
        "name": info.name,
        "index": info.index,
        "file": info.file,
        "kind": info.kind,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "scales_shape": None if info.scales_shape is None else list(info.scales_shape),
        "scales_dtype": info.scales_dtype,
        "scale_layout": tensor.scale_layout,
        "bytes": info.nbytes,
        "weight": None if tensor.weight is None else asdict(tensor.weight),
        "scales": None if tensor.scales is None else asdict(tensor.scales),
    }
