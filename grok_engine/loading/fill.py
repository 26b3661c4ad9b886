"""Fill a model from a checkpoint: the release, packed weights, random ones, and every format to come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import grok_kernels
from grok_engine.checkpoint.base import Checkpoint, TensorInfo, total_bytes
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.config import WeightFormat
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.log import QuietLogger
from grok_engine.models.decoder import Decoder
from grok_kernels.dtypes import FP8_MAX, TINY

from .slots import Slot, keeps_scales, slots

log = QuietLogger("grok_engine")

Progress = Callable[[int, int], None]  # bytes done, and in all
CHUNK = 4 << 20  # bytes in fp32 that are converted at once
LIMITS = {"int8": 127.0, "fp8_e4m3": FP8_MAX}  # the largest values of the formats that are rounded to


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
    """Say which matrices are not held as they are stored, though nobody asked for it."""
    changed = Counter(
        (info.stored or info.format, slot.format)
        for slot in found
        if isinstance(slot.module, FusedWeight)
        for info in slot.sources
        if info.stored or info.format != slot.format
    )
    for (stored, held), count in changed.items():
        log.warning("%d matrices of %s are held in %s, which loses nothing; `weights` chooses", count, stored, held)


def load(slot: Slot, checkpoint: Checkpoint, device: torch.device | str, packed: bool | None = None) -> None:
    """Fill one module, a named tensor at a time and expert by expert. packed: as for `Slot.allocate`."""
    module = slot.module
    slot.allocate(device, packed)
    if isinstance(module, NamedTensor):
        (info,) = slot.sources
        for rows in _spans(info) if len(info.shape) == 2 else [None]:
            values, *scales = checkpoint.read(info.name, rows=rows)
            module.fill(_times(values.float(), scales[0], info) if scales else values, rows.start if rows else 0)
        return
    for part, info in zip(module.parts, slot.sources, strict=True):
        for e in range(module.experts):
            for rows in _spans(info):
                planes = checkpoint.read(info.name, expert=e if len(info.shape) == 3 else None, rows=rows)
                _write(slot, module, e, part.start + rows.start, info, planes)


def _spans(info: TensorInfo) -> Iterator[slice]:
    """All rows of a matrix, in several spans where reading converts them: no whole matrix in fp32 is in memory."""
    n, k = info.shape[-2:]
    rows = _rows(info, k) if info.stored else n
    return (slice(at, min(at + rows, n)) for at in range(0, n, rows))


def _rows(info: TensorInfo, k: int) -> int:
    """How many rows of k numbers to convert at once: whole blocks of scales and whole panels, which hold 64."""
    unit = math.lcm(info.block[0] if info.block else 1, 64)
    return max(CHUNK // (4 * k) // unit, 1) * unit


def _write(
    slot: Slot, module: FusedWeight, expert: int, start: int, info: TensorInfo, planes: tuple[Tensor, ...]
) -> None:
    """One expert's matrix of a named tensor: bit for bit where format and scales can stay, else by way of fp32."""
    values_NK, scales_EGN = planes[0], module.weight.scales
    n, k = values_NK.shape
    if info.block is None and not slot.groups:
        module.write(expert, start, values_NK)
        return
    if info.block is not None and keeps_scales(info, slot.format, slot.groups):
        assert scales_EGN is not None
        scales_NG = planes[1].float().repeat_interleave(info.block[0], 0)[:n]
        scales_EGN[expert, :, start : start + n] = scales_NG.t().repeat_interleave(slot.groups // scales_NG.shape[1], 0)
        module.write(expert, start, values_NK)
        return
    rows = _rows(info, k)
    for at in range(0, n, rows):
        x_NK = values_NK[at : at + rows].to(torch.float32, copy=True)
        if info.block is not None:
            blocks = slice(at // info.block[0], -(-(at + rows) // info.block[0]))
            _times(x_NK, planes[1][blocks], info)
        if scales_EGN is not None:
            limit = LIMITS[slot.format]
            x_NGK = x_NK.unflatten(1, (slot.groups, -1))
            scale_NG = x_NGK.abs().amax(2).clamp_(min=TINY) / limit
            scales_EGN[expert, :, start + at : start + at + len(x_NK)] = scale_NG.t()
            x_NGK.div_(scale_NG[:, :, None]).clamp_(-limit, limit)
            if slot.format == "int8":
                x_NK.round_()
        module.write(expert, start + at, x_NK.to(module.weight.dtype))


def _times(x_NK: Tensor, scales: Tensor, info: TensorInfo) -> Tensor:
    """x with each block of rows and columns multiplied by its scale, in place."""
    assert info.block is not None
    scales_NG = scales.float().repeat_interleave(info.block[0], 0)[: len(x_NK)]
    for scale_N1, columns_NK in zip(scales_NG.split(1, 1), x_NK.split(info.block[1], 1), strict=True):
        columns_NK.mul_(scale_N1)
    return x_NK


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
