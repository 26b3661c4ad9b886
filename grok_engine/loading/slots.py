"""Match the modules of a model with the tensors of a checkpoint, and decide how each module is held."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from grok_engine.checkpoint.base import Checkpoint, TensorInfo, all_problems
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.checkpoint.rows import ROUNDED, scale_groups
from grok_engine.config import WeightFormat
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.moe import Experts
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.models.decoder import Decoder
from grok_kernels import formats as kernel_formats
from grok_kernels.dtypes import DTYPES, NAMES

FORMATS = {weights: format for weights, (format, _) in ROUNDED.items()} | {"bf16": "bf16", "fp32": "fp32"}
SCALED = tuple(name for name, format in kernel_formats.FORMATS.items() if "scales" in format.planes)


@dataclass(frozen=True, slots=True)
class Slot:
    """What one module takes from a checkpoint, and how it is held: `groups` of scales along K, 0 for none."""

    path: str  # of the module in the model
    module: NamedTensor | FusedWeight
    sources: tuple[TensorInfo, ...]
    format: str
    groups: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.format]

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, N, K), or the shape of a named tensor, whatever the layout."""
        module = self.module
        return module.shape if isinstance(module, NamedTensor) else (module.experts, module.n, module.k)

    @property
    def nbytes(self) -> int:
        """Held in memory."""
        return math.prod(self.shape) * self.dtype.itemsize + 4 * self.groups * math.prod(self.shape[:-1])

    def allocate(self, device: torch.device | str, packed: bool | None = None) -> None:
        """Make room, uninitialised. packed: in panels, or None to leave it to the device's kernels."""
        if isinstance(self.module, FusedWeight):
            self.module.allocate(self.dtype, self.groups, device, packed)
        else:
            self.module.allocate(self.dtype, device, packed)


def slots(model: Decoder, checkpoint: Checkpoint, weights: WeightFormat | None = None) -> list[Slot]:
    """What each module of `model` takes, in the modules' order.

    Raises one CheckpointError that names every tensor that is missing, that the model has no place for, that does not
    have the shape of its place, or that cannot become `weights`.
    """
    packed = checkpoint if isinstance(checkpoint, PackedCheckpoint) else None
    found: dict[str, Slot] = {}
    problems: list[str] = []
    names: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, (NamedTensor, FusedWeight)):
            continue
        own = [module.name] if isinstance(module, NamedTensor) else [part.name for part in module.parts]
        wanted = [path] if packed else own
        names.update(wanted)
        infos = tuple(checkpoint.tensors[name] for name in wanted if name in checkpoint.tensors)
        if len(infos) < len(wanted):
            continue
        found[path] = Slot(path, module, infos, *_held_as(model, module, infos, weights))
    found.update(_widened(model, found))
    for slot in found.values():
        problems += _misfits(slot)
        if packed:
            problems += _packed_misfits(slot, packed)
    missing, unused = sorted(names - checkpoint.tensors.keys()), sorted(checkpoint.tensors.keys() - names)
    if unused:
        problems.insert(0, f"tensors without a place {unused}")
    if missing:
        problems.insert(0, f"missing tensors {missing}")
    if problems:
        head = f"{checkpoint.source} does not hold the model:"
        raise all_problems(head, problems)
    return list(found.values())


def _held_as(
    model: Decoder, module: NamedTensor | FusedWeight, infos: Sequence[TensorInfo], weights: WeightFormat | None
) -> tuple[str, int]:
    """Format, and groups of scales along K, of a module made of these tensors.

    Without `weights` it is the format that loses nothing: the tensors' own, or fp32 where kernels do not take their
    scales or where their formats differ.
    """
    if isinstance(module, NamedTensor):
        dtype = model.dtype if isinstance(module, Embedding) else torch.float32
        return NAMES[dtype], 0
    formats = {info.format for info in infos}
    stored = infos[0].format if len(formats) == 1 else "fp32"  # which holds what either has
    groups = 1
    if stored in SCALED:
        groups = math.lcm(*(-(-module.k // info.block[1]) for info in infos if info.block))
    kept = all(keeps_scales(info, stored, groups) for info in infos)
    wanted = FORMATS[weights] if weights else stored if kept or stored not in SCALED else "fp32"
    if wanted not in SCALED:
        return wanted, 0
    if kept and wanted == stored:
        return wanted, groups
    return wanted, scale_groups(weights, module.k) if weights in ROUNDED else 1


def keeps_scales(info: TensorInfo, format: str, groups: int) -> bool:
    """Whether a weight of this format, with so many groups of scales along K, can keep values and scales."""
    if info.format != format or info.block is None:
        return False
    k, columns = info.shape[-1], info.block[1]
    return k % columns == 0 and groups % (k // columns) == 0


def _widened(model: Decoder, found: Mapping[str, Slot]) -> Iterator[tuple[str, Slot]]:
    """The two weights of experts, in fp32, where the checkpoint's formats differ: `moe` takes one format for both."""
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            pair = [slot for slot in (found.get(f"{path}.w13"), found.get(f"{path}.w2")) if slot]
            if len({slot.format for slot in pair}) > 1:
                yield from ((slot.path, replace(slot, format="fp32", groups=0)) for slot in pair)


def _misfits(slot: Slot) -> Iterator[str]:
    """What is wrong with the tensors of a slot, one line each."""
    module, infos = slot.module, slot.sources
    places = [slot.shape]
    if isinstance(module, FusedWeight) and len(infos) == len(module.parts):  # a packed tensor is fused already
        places = [(module.experts, part.stop - part.start, module.k) for part in module.parts]
    for info, shape in zip(infos, places, strict=True):
        if info.shape != shape and (1, *info.shape) != shape:  # one matrix may come without an axis of experts
            yield f"{info.name} has shape {info.shape}, expected {shape}"
        if (info.block is None) == (info.format in SCALED):
            yield f"{info.name} is {info.format} {'without' if info.block is None else 'with'} scales"


def _packed_misfits(slot: Slot, checkpoint: PackedCheckpoint) -> Iterator[str]:
    """As `_misfits`, for values that are taken as they lie."""
    (info,) = slot.sources
    if info.format != slot.format:
        yield f"{info.name} is {info.format}, expected {slot.format}: other weights or dtypes take a new conversion"
    found = tuple(checkpoint.read(info.name)[0].shape)
    expected = slot.module.shape_in(info.layout, DTYPES[info.format])
    if found != expected:
        yield f"{info.name} has shape {found} in {info.layout}, expected {expected}"
