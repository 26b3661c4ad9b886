"""A converted checkpoint under the engine's names: what its modules fused and packed, taken apart again."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from grok_engine.checkpoint.base import CheckpointError, TensorInfo
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.layers.weight import NamedTensor, holders
from grok_engine.models.decoder import Decoder
from grok_kernels import Weight
from grok_kernels.formats import FORMATS, WIDTH


class UnfusedCheckpoint:
    """As `Checkpoint`. `packed` must hold the modules of `model` (`slots`), except a head made from the embedding."""

    def __init__(self, packed: PackedCheckpoint, model: Decoder) -> None:
        self.source, self._packed = packed.source, packed
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, int]] = {}  # the module, and its first row of this tensor
        for path, module in holders(model):
            if module is model.lm_head and model.config.tie_embeddings:
                continue
            info = packed.tensors[path]
            if isinstance(module, NamedTensor):
                self._add(module.name, path, 0, replace(info, shape=module.shape))
                continue
            lead = info.shape[:-2] if info.shape[0] > 1 else ()
            for part in module.parts:
                rows = part.stop - part.start
                nbytes = info.nbytes * rows // info.shape[-2]
                self._add(part.name, path, part.start, replace(info, shape=(*lead, rows, module.k), nbytes=nbytes))

    def _add(self, name: str, path: str, start: int, info: TensorInfo) -> None:
        stored = f"{info.format} in panels" if info.layout == "panels" else info.stored  # reading makes a copy
        self.tensors[name] = replace(info, name=name, layout="rows", stored=stored)
        self._places[name] = path, start

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`. Values in panels are copied, those of the rows asked for and up to 63 beside them."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source}: expected the name of a tensor, found {name!r}")
        info, (path, start) = self.tensors[name], self._places[name]
        if path not in self._packed.weights:
            planes = self._packed.read(path)
            return planes if rows is None else tuple(plane[rows] for plane in planes)
        rows = rows or slice(0, info.shape[-2])
        experts = slice(None) if expert is None else slice(expert, expert + 1)
        planes = _rows(self._packed.weight(path), experts, start + rows.start, start + rows.stop)
        whole = expert is None and len(info.shape) == 3
        return planes if whole else tuple(plane[0] for plane in planes)


def _rows(weight: Weight, experts: slice, start: int, stop: int) -> tuple[Tensor, ...]:
    """Planes of these rows: values (E, n, K), and others (E, n, groups)."""
    first = 0
    if weight.layout == "panels":
        panels, first = slice(start // WIDTH, -(-stop // WIDTH)), start // WIDTH * WIDTH
        whole_bytes = not FORMATS[weight.format].in_bit_planes
        rest = [
            plane[experts, :, first : panels.stop * WIDTH] if whole_bytes else plane[experts, panels]
            for plane in weight.planes[1:]
        ]
        values = weight.values[experts, panels].contiguous()
        shape = (values.shape[0], values.shape[1] * WIDTH, weight.shape[2])
        weight = Weight(weight.format, "panels", shape, (values, *rest)).with_layout("rows")
        start, stop, experts = start - first, stop - first, slice(None)
    values, *others = weight.planes
    return values[experts, start:stop], *(plane[experts, :, start:stop].mT for plane in others)
