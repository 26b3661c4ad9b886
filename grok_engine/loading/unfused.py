"""A converted checkpoint under the engine's names: what its modules fused and packed, taken apart again."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from grok_engine.checkpoint.base import CheckpointError, TensorInfo
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.models.decoder import Decoder
from grok_kernels.formats import WIDTH
from grok_kernels.layouts import unpack


class UnfusedCheckpoint:
    """As `Checkpoint`. `packed` must hold the modules of `model` (`slots`)."""

    def __init__(self, packed: PackedCheckpoint, model: Decoder) -> None:
        self.source, self._packed = packed.source, packed
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, int]] = {}  # the module, and its first row of this tensor
        for path, module in model.named_modules():
            if isinstance(module, NamedTensor):
                info = packed.tensors[path]
                self._add(module.name, path, 0, replace(info, shape=module.shape))
            elif isinstance(module, FusedWeight):
                info = packed.tensors[path]
                lead = info.shape[:-2] if info.shape[0] > 1 else ()
                for part in module.parts:
                    rows = part.stop - part.start
                    nbytes = info.nbytes * rows // info.shape[-2]
                    self._add(part.name, path, part.start, replace(info, shape=(*lead, rows, module.k), nbytes=nbytes))

    def _add(self, name: str, path: str, start: int, info: TensorInfo) -> None:
        stored = "panels" if info.layout == "panels" else info.stored  # which makes reading a copy
        self.tensors[name] = replace(info, name=name, layout="rows", stored=stored)
        self._places[name] = path, start

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`. Values in panels are copied, those of the rows asked for and up to 63 beside them."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source}: expected the name of a tensor, found {name!r}")
        info, (path, start) = self.tensors[name], self._places[name]
        values, *scales = self._packed.read(path)
        if len(info.shape) == 1:
            return (values,)
        rows = rows or slice(0, info.shape[-2])
        part = slice(start + rows.start, start + rows.stop)
        if self._packed.tensors[path].layout == "panels":
            panels = slice(part.start // WIDTH, -(-part.stop // WIDTH))
            chosen = values[:, panels] if expert is None else values[expert : expert + 1, panels]
            first = part.start - panels.start * WIDTH
            values = unpack(chosen.contiguous())[:, first : first + part.stop - part.start]
        else:
            values = values.view(-1, *values.shape[-2:])
            values = (values if expert is None else values[expert : expert + 1])[:, part]
        planes = [values, *((s if expert is None else s[expert : expert + 1])[:, part] for s in scales)]
        whole = expert is None and len(info.shape) == 3
        return tuple(plane if whole else plane[0] for plane in planes)
