"""Fill a model from a checkpoint: the release, packed weights, random ones, and every format to come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import grok_kernels
from grok_engine.checkpoint.base import Checkpoint, TensorInfo, total_bytes
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.config import WeightFormat
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.models.decoder import Decoder
from grok_kernels.dtypes import FP8_MAX, TINY

from .slots import Slot, slots

Progress = Callable[[int, int], None]  # bytes done, and in all
CHUNK = 4 << 20  # bytes in fp32 that are converted at once


def fill(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    weights: WeightFormat | None = None,
    mapped: bool = False,
    progress: Progress | None = None,
) -> None:
    """Fill `model`, on its device and in the layout that the device's kernels want. Raises as `slots` does.

    `weights` None keeps each matrix as the checkpoint has it, int8 bit for bit; bf16 and fp32 dequantise; fp8
    dequantises and rounds to e4m3, saturating, with a scale amax / 448 for each output channel. Norms and router are
    kept in fp32, the embedding in the model's dtype. Besides the model, at most one source tensor is in memory.

    A converted checkpoint is read into one block of memory on a CPU. With `mapped` the file itself is used, and the
    system loads its pages on demand. Devices and kernels that do not use panels get rows.
    """
    found = slots(model, checkpoint, weights)
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


def load(slot: Slot, checkpoint: Checkpoint, device: torch.device | str, packed: bool | None = None) -> None:
    """Fill one module, a named tensor at a time and expert by expert. packed: as for `Slot.allocate`."""
    module = slot.module
    slot.allocate(device, packed)
    if isinstance(module, NamedTensor):
        module.fill(checkpoint.read(slot.sources[0].name)[0])
        return
    for part, info in zip(module.parts, slot.sources, strict=True):
        for e in range(module.experts):
            planes = checkpoint.read(info.name, expert=e if len(info.shape) == 3 else None)
            _write(slot, module, e, part.start, info, planes)


def _write(
    slot: Slot, module: FusedWeight, expert: int, start: int, info: TensorInfo, planes: tuple[Tensor, ...]
) -> None:
    """One expert's matrix of a named tensor: bit for bit where format and scales can stay, else by way of fp32."""
    values_NK, n, scales_EGN = planes[0], planes[0].shape[0], module.weight.scales
    if info.block is None and not slot.groups:
        module.write(expert, start, values_NK)
        return
    scales_NG = None
    if info.block is not None:
        scales_NG = planes[1].float().repeat_interleave(info.block[0], 0)[:n]
        if info.format == slot.format and slot.groups * info.block[1] % module.k == 0:
            assert scales_EGN is not None
            repeats = slot.groups // scales_NG.shape[1]
            scales_EGN[expert, :, start : start + n] = scales_NG.t().repeat_interleave(repeats, 0)
            module.write(expert, start, values_NK)
            return
    rows = max(CHUNK // (4 * values_NK.shape[1]) // 64, 1) * 64  # panels hold 64 rows
    for at in range(0, n, rows):
        x_NK = values_NK[at : at + rows].to(torch.float32, copy=True)
        if scales_NG is not None and info.block is not None:
            for scale_N1, columns_NK in zip(scales_NG.split(1, 1), x_NK.split(info.block[1], 1), strict=True):
                columns_NK.mul_(scale_N1[at : at + rows])
        if scales_EGN is not None:
            scale_N = x_NK.abs().amax(1).clamp_(min=TINY) / FP8_MAX
            scales_EGN[expert, 0, start + at : start + at + len(x_NK)] = scale_N
            x_NK.div_(scale_N[:, None]).clamp_(-FP8_MAX, FP8_MAX)
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
