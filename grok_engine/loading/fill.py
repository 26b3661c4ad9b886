"""Fill a model from a checkpoint: the release, packed weights, random ones, and every format to come.

`slots` matches the model's modules with the checkpoint's tensors and decides how each is held; `fill` then moves one
tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import grok_kernels
from grok_engine.checkpoint.base import Checkpoint, CheckpointError, TensorInfo, total_bytes
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.config import WeightFormat
from grok_engine.dtypes import DTYPES, FP8_MAX
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.weight import Table, Weight
from grok_engine.models.decoder import Decoder

Progress = Callable[[int, int], None]  # bytes done, and in all
FORMATS: dict[WeightFormat, str] = {"int8": "int8", "fp8": "fp8_e4m3", "bf16": "bf16", "fp32": "fp32"}
SCALED = ("int8", "fp8_e4m3")
CHUNK = 4 << 20  # bytes in fp32 that are converted at once
TINY = 2.0**-100  # the least amax, so that no scale is 0


@dataclass(frozen=True, slots=True)
class Slot:
    """What one module takes from a checkpoint, and how it is held: `groups` of scales along K, 0 for none."""

    path: str  # of the module in the model
    module: Table | Weight
    sources: tuple[TensorInfo, ...]
    format: str
    groups: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.format]

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, N, K), or a table's shape, whatever the layout."""
        return _shape(self.module)

    @property
    def nbytes(self) -> int:
        """Held in memory."""
        scales = self.groups * math.prod(self.shape[:-1])
        return math.prod(self.shape) * self.dtype.itemsize + 4 * scales

    def allocate(self, device: torch.device | str, packed: bool | None = None) -> None:
        """Make room, uninitialised. packed: in panels, or None to leave it to the device's kernels."""
        if isinstance(self.module, Weight):
            self.module.allocate(self.dtype, self.groups, device, packed)
        else:
            self.module.allocate(self.dtype, device, packed)

    def load(self, checkpoint: Checkpoint, device: torch.device | str, packed: bool | None = None) -> None:
        """Allocate, then read a named tensor at a time, expert by expert. packed: as for `allocate`."""
        self.allocate(device, packed)
        if isinstance(self.module, Table):
            self.module.fill(checkpoint.read(self.sources[0].name)[0])
            return
        for part, info in zip(self.module.parts, self.sources, strict=True):
            for e in range(self.module.experts):
                planes = checkpoint.read(info.name, expert=e if len(info.shape) == 3 else None)
                self._write(self.module, e, part.start, info, planes)

    def _write(self, module: Weight, expert: int, start: int, info: TensorInfo, planes: tuple[Tensor, ...]) -> None:
        """One expert's matrix of a named tensor: bit for bit where format and scales can stay, else by way of fp32."""
        values_NK, n = planes[0], planes[0].shape[0]
        if info.block is None and not self.groups:
            module.write(expert, start, values_NK)
            return
        scales_NG = None
        if info.block is not None:
            scales_NG = planes[1].float().repeat_interleave(info.block[0], 0)[:n]
            if info.format == self.format and self.groups * info.block[1] % module.k == 0:
                assert module.scale is not None
                repeats = self.groups // scales_NG.shape[1]
                module.scale[expert, :, start : start + n] = scales_NG.t().repeat_interleave(repeats, 0)
                module.write(expert, start, values_NK)
                return
        rows = max(CHUNK // (4 * values_NK.shape[1]) // 64, 1) * 64  # panels hold 64 rows
        for at in range(0, n, rows):
            x_NK = values_NK[at : at + rows].to(torch.float32, copy=True)
            if scales_NG is not None and info.block is not None:
                for scale_N1, columns_NK in zip(scales_NG.split(1, 1), x_NK.split(info.block[1], 1), strict=True):
                    columns_NK.mul_(scale_N1[at : at + rows])
            if module.scale is not None:
                scale_N = x_NK.abs().amax(1).clamp_(min=TINY) / FP8_MAX
                module.scale[expert, 0, start + at : start + at + len(x_NK)] = scale_N
                x_NK.div_(scale_N[:, None]).clamp_(-FP8_MAX, FP8_MAX)
            module.write(expert, start + at, x_NK.to(module.weight.dtype))


def fill(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    weights: WeightFormat | None = None,
    mapped: bool = False,
    progress: Progress | None = None,
) -> None:
    """Fill `model`, on its device and in the layout that the device's kernels want. Raises as `slots` does.

    `weights` None keeps each matrix as the checkpoint has it, int8 bit for bit; bf16 and fp32 dequantise; fp8 rounds
    what that gives to e4m3, saturating, with a scale amax / 448 for each output channel. Norms and router are kept in
    fp32, the embedding in the model's dtype. Beside the weights never more than one tensor is in memory.

    Packed weights are one block of memory on a CPU, read in whole, or with `mapped` the file itself, whose pages come
    when they are used and may be dropped again. Devices and kernels that do not want them packed get rows.
    """
    found = slots(model, checkpoint, weights)
    device, total, done = model.cos_sin.device, total_bytes(checkpoint), 0
    if isinstance(checkpoint, PackedCheckpoint):
        in_place = device.type == "cpu" and (mapped or all(_is_wanted(slot) for slot in found))
        whole = in_place and not mapped
        if whole:
            checkpoint.read_all(grok_kernels.huge_pages(checkpoint.total_bytes), progress)
        for slot in found:
            _adopt(slot, checkpoint, None if in_place else device)
            done += slot.sources[0].nbytes
            if progress and not whole:
                progress(done, total)
        return
    for slot in found:
        slot.load(checkpoint, device)
        for info in slot.sources:
            done += info.nbytes
            if progress:
                progress(done, total)


def slots(model: Decoder, checkpoint: Checkpoint, weights: WeightFormat | None = None) -> list[Slot]:
    """What each module of `model` takes, in the modules' order.

    Raises one CheckpointError that names every tensor that is missing, that the model has no place for, that does not
    have the shape of its place, or that cannot become `weights`.
    """
    packed = isinstance(checkpoint, PackedCheckpoint)
    found: list[Slot] = []
    problems: list[str] = []
    names: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, (Table, Weight)):
            continue
        wanted = [path] if packed else _names(module)
        names.update(wanted)
        infos = tuple(checkpoint.tensors[name] for name in wanted if name in checkpoint.tensors)
        if len(infos) < len(wanted):
            continue
        slot = Slot(path, module, infos, *_held_as(model, module, infos, weights))
        misfits = list(_misfits(slot))
        if isinstance(checkpoint, PackedCheckpoint):
            misfits += _packed_misfits(slot, checkpoint)
        problems += misfits
        found.append(slot)
    missing, unused = sorted(names - checkpoint.tensors.keys()), sorted(checkpoint.tensors.keys() - names)
    if unused:
        problems.insert(0, f"tensors without a place {unused}")
    if missing:
        problems.insert(0, f"missing tensors {missing}")
    if problems:
        head = f"{checkpoint.source} does not hold the model:"
        raise CheckpointError("\n  ".join([head, *problems]), tuple(problems))
    return found


def _names(module: Table | Weight) -> list[str]:
    return [module.name] if isinstance(module, Table) else [part.name for part in module.parts]


def _shape(module: Table | Weight) -> tuple[int, ...]:
    return module.shape if isinstance(module, Table) else (module.experts, module.n, module.k)


def _held_as(
    model: Decoder, module: Table | Weight, infos: Sequence[TensorInfo], weights: WeightFormat | None
) -> tuple[str, int]:
    """Format, and groups of scales along K, of a module made of these tensors."""
    if isinstance(module, Table):
        dtype = model.dtype if isinstance(module, Embedding) else torch.float32
        return next(name for name, d in DTYPES.items() if d == dtype), 0
    stored = infos[0].format
    wanted = FORMATS[weights] if weights else stored
    if wanted not in SCALED:
        return wanted, 0
    if wanted == stored == "int8":
        return wanted, math.lcm(*(module.k // info.block[1] for info in infos if info.block))
    return wanted, 1  # e4m3 is held with a scale per output channel


def _misfits(slot: Slot) -> Iterator[str]:
    """What is wrong with the tensors of a slot, one line each."""
    module, infos = slot.module, slot.sources
    places = [slot.shape]
    if isinstance(module, Weight) and len(infos) == len(module.parts):  # a packed tensor is fused already
        places = [(module.experts, part.stop - part.start, module.k) for part in module.parts]
    for info, shape in zip(infos, places, strict=True):
        if info.shape != shape and (1, *info.shape) != shape:  # one matrix may come without an axis of experts
            yield f"{info.name} has shape {info.shape}, expected {shape}"
        if (info.block is None) == (info.format in SCALED):
            yield f"{info.name} is {info.format} {'without' if info.block is None else 'with'} scales"
        elif slot.format == "int8" and info.block is not None and slot.shape[-1] % info.block[1]:
            yield f"{info.name} has a scale for {info.block[1]} columns, expected a divisor of {slot.shape[-1]}"
    if len(formats := sorted({info.format for info in infos})) > 1:
        yield f"{', '.join(info.name for info in infos)} are fused, but have formats {', '.join(formats)}"
    elif slot.format == "int8" and infos[0].format != "int8":
        for info in infos:
            yield f"{info.name} is {info.format}, expected int8: weights='int8' keeps released values"


def _packed_misfits(slot: Slot, checkpoint: PackedCheckpoint) -> Iterator[str]:
    """As `_misfits`, for values that are taken as they lie."""
    (info,) = slot.sources
    if info.format != slot.format:
        yield f"{info.name} is {info.format}, expected {slot.format}: other weights or dtypes take a new conversion"
    found = tuple(checkpoint.read(info.name)[0].shape)
    expected = slot.module.form(DTYPES[info.format], "cpu", info.layout == "panels")
    if found != expected:
        yield f"{info.name} has shape {found} in {info.layout}, expected {expected}"


def _is_wanted(slot: Slot) -> bool:
    """Whether packed values lie as the CPU's kernels want them."""
    panels = slot.module.form(slot.dtype, "cpu") != slot.shape
    return panels == (slot.sources[0].layout == "panels")


def _adopt(slot: Slot, checkpoint: PackedCheckpoint, device: torch.device | None) -> None:
    """Let the module have the planes: as they are, or as rows copied to `device`."""
    values, *scales = checkpoint.read(slot.path)
    if device is not None:
        if slot.sources[0].layout == "panels":
            values = grok_kernels.unpack_weight(values).view(slot.shape)
        values = values.to(device, copy=True)
        scales = [scale.mT.to(device, copy=True).mT for scale in scales]
    slot.module.register_parameter("weight", nn.Parameter(values, requires_grad=False))
    for scale in scales:
        slot.module.register_parameter("scale", nn.Parameter(scale.mT, requires_grad=False))
