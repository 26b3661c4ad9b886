"""Match the modules of a model with the tensors of a checkpoint, and decide how each module is held."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from grok_engine.checkpoint.base import Checkpoint, TensorInfo, all_problems
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.checkpoint.rows import ROUNDED, rounded_spec
from grok_engine.checkpoint.widened import WidenedCheckpoint
from grok_engine.config import WeightFormat
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.linear import Linear
from grok_engine.layers.moe import Experts
from grok_engine.layers.weight import FusedWeight, NamedTensor, holders
from grok_engine.models.decoder import Decoder
from grok_kernels import Spec, mixes_formats, takes_format
from grok_kernels.dtypes import NAMES
from grok_kernels.formats import FORMATS

# A format with more bits that holds all values of another, with the same scales.
MORE_BITS = {"int4": "int5", "int4_min": "int5_min", "int4_k": "int5_k"}
SCALED = tuple(name for name, format in FORMATS.items() if "scales" in format.planes)


@dataclass(frozen=True, slots=True)
class Slot:
    """What one module takes from a checkpoint, and what it is held in."""

    path: str  # of the module in the model
    module: NamedTensor | FusedWeight
    sources: tuple[TensorInfo, ...]
    spec: Spec

    def nbytes(self, device: torch.device | str) -> int:
        """In memory on this device."""
        if isinstance(self.module, NamedTensor):
            return 4 * math.prod(self.module.shape)
        return self.spec.nbytes(self.module.layout_for(self.spec, device), self.module.shape)

    def converts_head(self, model: Decoder) -> bool:
        """Whether it is the output head, in a format that was asked for: it is not taken as a packed file has it."""
        return model.head is not None and self.module is model.lm_head

    def allocate(self, device: torch.device | str, packed: bool | None = None) -> None:
        """Make room, uninitialised. packed: in panels, or None to leave it to the device's kernels."""
        if isinstance(self.module, FusedWeight):
            self.module.allocate(self.spec, device, packed)
        else:
            self.module.allocate(device)


def served(checkpoint: Checkpoint, weights: WeightFormat | None, device: str) -> Checkpoint:
    """The checkpoint in formats that loading takes as they are: what is converted to `weights`, and what a device of
    this type does not multiply by, in 8 bits or floats."""

    def keep(info: TensorInfo) -> bool:
        wanted = weights is None or info.format == ROUNDED.get(weights, ("",))[0]
        return wanted and takes_format(info.format, device, info.scales == "fp16")

    if all(map(keep, checkpoint.tensors.values())):
        return checkpoint
    return WidenedCheckpoint(checkpoint, keep)


def slots(
    model: Decoder, checkpoint: Checkpoint, weights: WeightFormat | None = None, device: str = "cpu"
) -> list[Slot]:
    """What each module of `model` takes on a device of this type, in the modules' order. Linear layers whose matrices
    have several formats are divided. A tied head has a slot only where `model.head` is not what the embedding is held
    in. checkpoint: as of `served`.

    Raises one CheckpointError that names every tensor that is missing, that the model has no place for, that does not
    have the shape of its place, or that cannot become `weights`.
    """
    packed = checkpoint if isinstance(checkpoint, PackedCheckpoint) else None
    found: dict[str, Slot] = {}
    problems: list[str] = []
    names: set[str] = set()
    for path, linear in list(model.named_modules()):
        if isinstance(linear, Linear):
            linear.divide(_runs(path, linear, checkpoint) if weights is None else ())
    for path, module in holders(model):
        own = [module.name] if isinstance(module, NamedTensor) else [part.name for part in module.parts]
        converted = model.head if module is model.lm_head else None
        wanted = [path] if packed and converted is None else own
        names.update(wanted)
        infos = tuple(checkpoint.tensors[name] for name in wanted if name in checkpoint.tensors)
        if len(infos) < len(wanted):
            continue
        found[path] = Slot(path, module, infos, _held_as(model, module, infos, converted or weights))
    if packed is None and not mixes_formats(device):
        found.update(_widened(model, found))
    for slot in found.values():
        problems += _misfits(slot)
        if packed:
            problems += _packed_misfits(slot, packed) if not slot.converts_head(model) else ()
    missing, unused = sorted(names - checkpoint.tensors.keys()), sorted(checkpoint.tensors.keys() - names)
    if unused:
        problems.insert(0, f"tensors without a place {unused}")
    if missing:
        problems.insert(0, f"missing tensors {missing}")
    if problems:
        head = f"{checkpoint.source} does not hold the model:"
        raise all_problems(head, problems)
    if model.config.tie_embeddings and "lm_head" in found and found["lm_head"].spec == found["embed"].spec:
        del found["lm_head"]
    return list(found.values())


def _runs(path: str, linear: Linear, checkpoint: Checkpoint) -> list[int]:
    """How many neighbouring parts of a layer can be held as one weight, for all of its parts."""
    if isinstance(checkpoint, PackedCheckpoint):
        sizes, found = [part.stop - part.start for part in linear.parts], list[int]()
        while (info := checkpoint.tensors.get(f"{path}.{len(found)}")) is not None:
            ends, at = [sum(sizes[:i]) for i in range(len(sizes) + 1)], sum(found)
            rows = ends[at] + info.shape[-2]
            found.append(ends.index(rows) - at if rows in ends else 1)
        return found if sum(found) == len(sizes) else []
    infos = [checkpoint.tensors.get(part.name) for part in linear.parts]
    return [len(list(run)) for _, run in groupby(info and _kind(info) for info in infos)]


def _kind(info: TensorInfo) -> str | Spec:
    """What matrices of one weight share: the format and, with fewer than 8 bits, the groups of scales."""
    return spec_of(info) if FORMATS[info.format].in_bit_planes else info.format


def spec_of(info: TensorInfo) -> Spec:
    """That of a matrix as it is stored, whose columns are whole groups."""
    k, columns = info.shape[-1], info.block[1] if info.block else 0
    scales = torch.float16 if info.scales == "fp16" else torch.float32
    return Spec(info.format, k // columns if columns else 0, k // info.sub if info.sub else 0, scales)


def _with_more_bits(spec: Spec) -> Spec:
    return replace(spec, format=MORE_BITS.get(spec.format, spec.format))


def _held_as(
    model: Decoder, module: NamedTensor | FusedWeight, infos: Sequence[TensorInfo], weights: WeightFormat | None
) -> Spec:
    """What a module made of these tensors is held in.

    Without `weights` it is what loses nothing: the tensors' own format, 5 bits for 4 and 5, or fp32 where kernels do
    not take their scales or where their formats differ otherwise; an embedding in floats has the model's dtype.
    """
    if isinstance(module, NamedTensor):
        return Spec("fp32")
    if isinstance(module, Embedding) and (weights or infos[0].format not in SCALED):
        return Spec(NAMES[model.dtype])
    if weights in ROUNDED:
        return _rounded_as(module, infos, weights)
    if weights:
        return Spec(weights)
    kinds = {_kind(info) for info in infos}
    if len(kinds) > 1 and len(specs := {_with_more_bits(spec_of(info)) for info in infos}) == 1:
        return specs.pop()
    stored = infos[0].format if len(kinds) == 1 else "fp32"  # which holds what any of them has
    if stored not in SCALED:
        return Spec(stored)
    spec = _common(module, infos)
    return spec if all(keeps_scales(info, spec) for info in infos) else Spec("fp32")


def _common(module: FusedWeight, infos: Sequence[TensorInfo]) -> Spec:
    """Groups of scales that are whole numbers of each tensor's."""
    if FORMATS[infos[0].format].in_bit_planes:
        return spec_of(infos[0])
    groups = math.lcm(*(-(-module.k // info.block[1]) for info in infos if info.block))
    fp16 = all(info.scales == "fp16" for info in infos)
    return Spec(infos[0].format, groups, 0, torch.float16 if fp16 else torch.float32)


def _rounded_as(module: FusedWeight, infos: Sequence[TensorInfo], weights: str) -> Spec:
    """Scales that fit are kept."""
    wanted = rounded_spec(weights, module.k)
    if all(info.format == wanted.format for info in infos):
        spec = _common(module, infos)
        if all(keeps_scales(info, spec) for info in infos):
            return spec
    return wanted


def keeps_scales(info: TensorInfo, spec: Spec) -> bool:
    """Whether a weight held as `spec` can keep values and scales."""
    if info.block is None or info.shape[-1] % info.block[1]:
        return False
    if FORMATS[spec.format].in_bit_planes:
        return spec in (spec_of(info), _with_more_bits(spec_of(info)))
    return info.format == spec.format and spec.groups % (info.shape[-1] // info.block[1]) == 0


def _widened(model: Decoder, found: Mapping[str, Slot]) -> Iterator[tuple[str, Slot]]:
    """The two weights of experts, in fp32, where the checkpoint's formats differ and `moe` takes one for both."""
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            pair = [slot for slot in (found.get(f"{path}.w13"), found.get(f"{path}.w2")) if slot]
            if len({slot.spec.format for slot in pair}) > 1:
                yield from ((slot.path, replace(slot, spec=Spec("fp32"))) for slot in pair)


def _misfits(slot: Slot) -> Iterator[str]:
    """What is wrong with the tensors of a slot, one line each."""
    module, infos = slot.module, slot.sources
    places: list[tuple[int, ...]] = [module.shape]
    if isinstance(module, FusedWeight) and len(infos) == len(module.parts):  # a packed tensor is fused already
        places = [(module.experts, part.stop - part.start, module.k) for part in module.parts]
    for info, shape in zip(infos, places, strict=True):
        if info.shape != shape and (1, *info.shape) != shape:  # one matrix may come without an axis of experts
            yield f"{info.name} has shape {info.shape}, expected {shape}"
        if (info.block is None) == (info.format in SCALED):
            yield f"{info.name} is {info.format} {'without' if info.block is None else 'with'} scales"


def _packed_misfits(slot: Slot, checkpoint: PackedCheckpoint) -> Iterator[str]:
    """As `_misfits`, for weights that are taken as they lie."""
    (info,) = slot.sources
    if info.format != slot.spec.format:
        expected = slot.spec.format
        yield f"{info.name} is {info.format}, expected {expected}: other weights or dtypes take a new conversion"
