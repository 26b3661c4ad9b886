"""Fill a model from a checkpoint: the release, packed weights, random ones, and every format to come."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

import grok_kernels
from grok_engine.checkpoint.base import Checkpoint, TensorInfo, total_bytes
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.checkpoint.rows import chunks, dequantized, expanded, read_spans, rounded
from grok_engine.config import WeightFormat
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.log import QuietLogger
from grok_engine.models.decoder import Decoder

from .slots import Slot, keeps_scales, slots

log = QuietLogger("grok_engine")

Progress = Callable[[int, int], None]  # bytes done, and in all


def fill(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    weights: WeightFormat | None = None,
    mapped: bool = False,
    progress: Progress | None = None,
) -> None:
    """Fill `model`, on its device and in the layout that the device's kernels want. Raises as `slots` does.

    `weights` None keeps each matrix as the checkpoint has it, 8-bit values bit for bit where kernels take its scales,
    else in fp32; bf16 and fp32 dequantise; int8 and fp8 dequantise and round, with a scale amax / 127 or amax / 448 for
    each output channel, int8_g128 with one for each channel and group of at most 128 columns. Norms and router are kept
    in fp32, the embedding in the model's dtype. Besides the model, at most one source tensor is in memory.

    A converted checkpoint is read into one block of memory on a CPU. With `mapped` the file itself is used, and the
    system loads its pages on demand. Devices and kernels that do not use panels get rows.
    """
    found = slots(model, checkpoint, weights)
    if weights is None:
        _log_conversions(found)
    device, total, done = model.cos_sin.device, total_bytes(checkpoint), 0
    packed = checkpoint if isinstance(checkpoint, PackedCheckpoint) else None
    in_place = packed is not None and device.type == "cpu" and (mapped or all(_is_wanted(slot) for slot in found))
    if packed is not None and in_place and not mapped:
        packed.read_all(grok_kernels.huge_pages(packed.total_bytes), progress)
        progress = None
    for slot in found:
        if packed is not None:
            _adopt(slot, packed, None if in_place else device)
        else:
            load(slot, checkpoint, device)
        for info in slot.sources:
            done += info.nbytes
            if progress:
                progress(done, total)


def _log_conversions(found: list[Slot]) -> None:
    """Say which matrices are not held as they are stored, though nobody asked for it: a warning where that takes more
    memory."""
    count, stored, held = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for slot in found:
        values = sum(math.prod(info.shape) for info in slot.sources)
        for info in slot.sources if isinstance(slot.module, FusedWeight) else ():
            if info.stored or info.format != slot.format:
                kind = (info.stored or info.format, slot.format)
                count[kind] += 1
                stored[kind] += info.nbytes
                held[kind] += slot.nbytes * math.prod(info.shape) // values
    for kind in count:
        grows = held[kind] > 1.25 * stored[kind]
        log.log(
            logging.WARNING if grows else logging.INFO,
            "%d matrices of %s are held in %s, which loses nothing and takes %.3g MB instead of %.3g%s",
            count[kind], *kind, held[kind] / 1e6, stored[kind] / 1e6,
            "; `weights` chooses a smaller format" if grows else "",
        )  # fmt: skip


def load(slot: Slot, checkpoint: Checkpoint, device: torch.device | str, packed: bool | None = None) -> None:
    """Fill one module, a named tensor at a time and expert by expert. packed: as for `Slot.allocate`."""
    module = slot.module
    slot.allocate(device, packed)
    if isinstance(module, NamedTensor):
        (info,) = slot.sources
        for rows in read_spans(info) if len(info.shape) == 2 else [None]:
            values, *scales = checkpoint.read(info.name, rows=rows)
            values = dequantized(values, scales[0], info.block) if scales else values
            module.fill(values, rows.start if rows else 0)
        return
    for part, info in zip(module.parts, slot.sources, strict=True):
        for e in range(module.experts):
            for rows in read_spans(info):
                planes = checkpoint.read(info.name, expert=e if len(info.shape) == 3 else None, rows=rows)
                _write(slot, module, e, part.start + rows.start, info, planes)


def _write(
    slot: Slot, module: FusedWeight, expert: int, start: int, info: TensorInfo, planes: tuple[Tensor, ...]
) -> None:
    """One expert's matrix of a named tensor: bit for bit where format and scales can stay, else by way of fp32."""
    values_NK, scales_EGN = planes[0], module.weight.scales
    n = len(values_NK)
    if info.block is None and not slot.groups:
        module.write(expert, start, values_NK)
        return
    if info.block is not None and keeps_scales(info, slot.format, slot.groups):
        assert scales_EGN is not None
        scales_NG = expanded(planes[1], info.block, n)
        scales_EGN[expert, :, start : start + n] = scales_NG.t().repeat_interleave(slot.groups // scales_NG.shape[1], 0)
        module.write(expert, start, values_NK)
        return
    for at, chunk_NK, scales in chunks(info, planes):
        x_NK = dequantized(chunk_NK, scales, info.block)
        if scales_EGN is not None:
            x_NK, scale_NG = rounded(x_NK, slot.format, slot.groups)
            scales_EGN[expert, :, start + at : start + at + len(x_NK)] = scale_NG.t()
        module.write(expert, start + at, x_NK.to(module.weight.dtype))


def _is_wanted(slot: Slot) -> bool:
    """Whether packed values lie as the CPU's kernels want them."""
    return slot.module.layout_for(slot.dtype, "cpu") == slot.sources[0].layout


def _adopt(slot: Slot, checkpoint: PackedCheckpoint, device: torch.device | None) -> None:
    """Let the module have the planes: as they are, or as rows copied to `device`."""
    module, layout = slot.module, slot.sources[0].layout
    values, *scales = checkpoint.read(slot.path)
    if isinstance(module, NamedTensor):
        module.hold(values, layout)
        if device is not None:
            module.hold(module.values().to(device, copy=True))
        return
    (scale,) = scales or (None,)  # a plane beyond would be lost
    weight = grok_kernels.Weight.of(values, None if scale is None else scale.mT, layout)
    if device is not None:
        rows = weight.with_layout("rows")
        planes = tuple(plane.to(device, copy=True) for plane in rows.planes)
        weight = grok_kernels.Weight(rows.format, rows.layout, rows.shape, planes)
    module.hold(weight)
