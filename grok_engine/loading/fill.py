"""Fill a model from a checkpoint: the release, packed weights, random ones, and every format to come."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import grok_kernels
from grok_engine.checkpoint.base import Checkpoint, TensorInfo
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.checkpoint.rows import chunks, dequantized, expanded, read_spans, rounded, row_step
from grok_engine.checkpoint.widened import widened, widened_planes
from grok_engine.config import WeightFormat
from grok_engine.layers.linear import Linear
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.log import QuietLogger
from grok_engine.models.decoder import Decoder
from grok_kernels import Spec, mixes_formats
from grok_kernels.formats import FORMATS, SUB

from .slots import Slot, keeps_scales, served, slots
from .unfused import UnfusedCheckpoint

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

    `weights` None keeps each matrix as the checkpoint has it, bit for bit, where the device multiplies by its format
    and kernels take its scales, else in 8 bits or fp32, which lose nothing either. bf16 and fp32 dequantise; the others
    dequantise and round (`rows.rounded`): int8 and fp8 with a scale amax / 127 or amax / 448 for each output channel,
    int8_g128 for each channel and group of at most 128 columns, int4 and int4_g128 in groups of at most 32 and 128.
    Norms and router are kept in fp32, an embedding in floats in the model's dtype. Besides the model, at most one
    source tensor is in memory.

    `model.head` does for the output head what `weights` does for other matrices. A tied head then has a weight of its
    own, or none where the embedding lies in that format.

    A converted checkpoint is read into one block of memory on a CPU. With `mapped` the file itself is used, and the
    system loads its pages on demand. Devices and kernels that do not use panels get rows.
    """
    device = model.cos_sin.device
    checkpoint = source_of(checkpoint, model, weights, device.type)
    found = slots(model, checkpoint, weights, device.type)
    taken = [slot for slot in found if not slot.converts_head(model)]
    if len(taken) == len(found) and model.config.tie_embeddings:
        model.lm_head = None  # the embedding serves
    if weights is None:
        _log_conversions(taken, device)
    total, done = sum(info.nbytes for slot in found for info in slot.sources), 0
    packed = checkpoint if isinstance(checkpoint, PackedCheckpoint) else None
    in_place = packed is not None and device.type == "cpu" and (mapped or all(map(_is_wanted, taken)))
    if packed is not None and in_place and not mapped:
        packed.read_all(grok_kernels.huge_pages(packed.total_bytes), progress)
        progress = None
    for slot in found:
        if packed is None:
            load(slot, checkpoint, device)
        elif not slot.converts_head(model):
            _adopt(slot, packed, None if in_place else device)
        else:
            unfused = UnfusedCheckpoint(packed, model)
            load(replace(slot, sources=tuple(unfused.tensors[info.name] for info in slot.sources)), unfused, device)
        for info in slot.sources:
            done += info.nbytes
            if progress:
                progress(done, total)


def source_of(checkpoint: Checkpoint, model: Decoder, weights: WeightFormat | None, device: str) -> Checkpoint:
    """What a device of this type is filled from (`served`): a converted checkpoint is taken apart where that differs
    from its own."""
    if not isinstance(checkpoint, PackedCheckpoint):
        return served(checkpoint, weights, device)
    formats = {path: info.format for path, info in checkpoint.tensors.items()}
    experts = [path.removesuffix(".w13") for path in formats if path.endswith(".w13")]
    mixed = any(formats[f"{path}.w13"] != formats.get(f"{path}.w2") for path in experts)
    taken = served(checkpoint, None, device) is checkpoint and (mixes_formats(device) or not mixed)
    if weights is not None or taken:
        return checkpoint
    slots(model, checkpoint)
    return served(UnfusedCheckpoint(checkpoint, model), None, device)


def _log_conversions(found: list[Slot], device: torch.device) -> None:
    """Say which matrices are not held as they are stored, though nobody asked for it: a warning where that takes more
    memory."""
    count, stored, held = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for slot in found:
        values = sum(math.prod(info.shape) for info in slot.sources)
        for info in slot.sources if type(slot.module) in (FusedWeight, Linear) else ():
            as_stored = not info.stored or info.scales == "fp16" or FORMATS[info.format].in_bit_planes
            if info.format != slot.spec.format or not as_stored:
                kind = (info.stored or info.format, slot.spec.format)
                count[kind] += 1
                stored[kind] += info.nbytes
                held[kind] += slot.nbytes(device) * math.prod(info.shape) // values
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
                for at, written in _converted(slot.spec, info, planes):
                    module.write(e, part.start + rows.start + at, written)


def _converted(spec: Spec, info: TensorInfo, planes: tuple[Tensor, ...]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Rows of a matrix as a weight takes them, a few at a time: bit for bit where format and scales can stay, else by
    way of fp32."""
    names = FORMATS[spec.format].planes
    if info.block is None and len(names) == 1:
        step = row_step(info)
        for at in range(0, len(planes[0]), step):
            yield at, {"values": planes[0][at : at + step].to(FORMATS[spec.format].dtype)}
        return
    if info.block is not None and keeps_scales(info, spec):
        scales = (planes[1], *planes[2:]) if info.block[0] == 1 else (expanded(planes[1], info.block, len(planes[0])),)
        groups = (spec.subgroups if name in SUB else spec.groups for name in names[1:])
        wide = (plane.t().repeat_interleave(g // plane.shape[1], 0) for plane, g in zip(scales, groups, strict=True))
        yield 0, dict(zip(names, (planes[0], *wide), strict=True))
        return
    if FORMATS[info.format].in_bit_planes:
        info, planes = widened(info), widened_planes(info, planes)
    for at, values_NK, blocks in chunks(info, planes):
        x_NK = dequantized(values_NK, blocks, info.block)
        if len(names) == 1:
            yield at, {"values": x_NK.to(FORMATS[spec.format].dtype)}
        else:
            q_NK, scale_NG = rounded(x_NK, spec.format, spec.groups)
            yield at, {"values": q_NK, "scales": scale_NG.t()}


def _is_wanted(slot: Slot) -> bool:
    """Whether packed values lie as the CPU's kernels want them."""
    if isinstance(slot.module, NamedTensor):
        return True
    return slot.module.layout_for(slot.spec, "cpu") == slot.sources[0].layout


def _adopt(slot: Slot, checkpoint: PackedCheckpoint, device: torch.device | None) -> None:
    """Let the module have the planes: as they are, or as rows copied to `device`."""
    if isinstance(slot.module, NamedTensor):
        (tensor,) = checkpoint.read(slot.path)
        slot.module.hold(tensor if device is None else tensor.to(device, copy=True))
        return
    weight = checkpoint.weight(slot.path)
    if device is not None:
        rows = weight.with_layout("rows")
        planes = tuple(plane.to(device, copy=True) for plane in rows.planes)
        weight = grok_kernels.Weight(rows.format, rows.layout, rows.shape, planes)
    slot.module.hold(weight)
