"""From a checkpoint's named tensors to a decoder's weights, and back; one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from grok_engine.checkpoint.quantize import quantize_matrix
from grok_engine.checkpoint.xai.pickles import Array
from grok_engine.checkpoint.xai.reader import CheckpointError, MappedTensor, TensorInfo, XaiCheckpoint
from grok_engine.config import ConfigError, WeightFormat, model_folder
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.weight import FusedWeight, NamedTensor, Part
from grok_engine.models.decoder import Decoder

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_DTYPES: dict[WeightFormat, torch.dtype] = {
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
CHUNK = 4 << 20  # bytes in fp32 that are converted at once
FP8_MAX = 448.0
TINY = 2.0**-100  # the least amax, so that no scale is 0


def resolve_model(model: str | Path) -> Path:
    """The folder of a model: a path, or the name of the one that ships with the package, `tiny`.

    The folder of the tensors stands for the one that it lies in (`model_folder`).
    """
    if str(model) == "tiny":
        return Path(str(files("grok_engine") / "assets" / "tiny"))
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ConfigError(f"model {str(model)!r} is not a folder: expected 'tiny' or the path of a checkpoint")
    return model_folder(path)


def as_torch(array: Array) -> Tensor:
    """The same memory as a tensor; numpy's bf16 comes from ml_dtypes, which torch does not know."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@dataclass(frozen=True, slots=True)
class Filling:
    """What one module of a model takes from a checkpoint, and as what: `groups` 0 is no scales."""

    path: str  # of the module in the model
    module: NamedTensor | FusedWeight
    names: tuple[str, ...]
    dtype: torch.dtype
    groups: int = 0

    def fill(self, checkpoint: XaiCheckpoint, device: torch.device | str, packed: bool | None = None) -> None:
        """Allocate the module's weight and read it, a named tensor at a time. packed: as for `FusedWeight.layout_for`."""
        module = self.module
        if isinstance(module, FusedWeight):
            module.allocate(self.dtype, self.groups, device, packed)
            for part in module.parts:
                _fill(module, part, checkpoint.read(part.name))
            return
        module.allocate(self.dtype, device, packed)
        module.fill(as_torch(checkpoint.read(module.name).weight))


def fillings(model: Decoder, checkpoint: XaiCheckpoint, weights: WeightFormat | None = None) -> list[Filling]:
    """How `model` is filled from `checkpoint`, in the order of its modules. Raises as `load_weights` does."""
    infos = {info.name: info for info in checkpoint.tensors}
    modules = [(path, m) for path, m in model.named_modules() if isinstance(m, (NamedTensor, FusedWeight))]
    wanted = {name for _, m in modules for name in _names(m)}
    if wanted != infos.keys():
        missing, unused = sorted(wanted - infos.keys()), sorted(infos.keys() - wanted)
        raise CheckpointError(f"{checkpoint.folder}: missing tensors {missing}, tensors without a place {unused}")
    found = []
    for path, module in modules:
        names = _names(module)
        if isinstance(module, NamedTensor):
            dtype = model.dtype if isinstance(module, Embedding) else torch.float32
            found.append(Filling(path, module, names, dtype))
            continue
        formats = {infos[name].dtype for name in names}
        if len(formats) > 1:
            raise CheckpointError(f"{checkpoint.folder}: {', '.join(names)} are fused, but have types {formats}")
        found.append(Filling(path, module, names, *_form([infos[name] for name in names], weights)))
    return found


def load_weights(
    model: Decoder,
    checkpoint: XaiCheckpoint,
    *,
    weights: WeightFormat | None = None,
    progress: Progress | None = None,
) -> None:
    """Fill `model` from `checkpoint`, on the device of `model`, in the form that the device's kernels want.

    `weights` None keeps each matrix as the checkpoint has it, int8 bit for bit; bf16 and fp32 dequantise; fp8 rounds
    what that gives to e4m3, saturating, with a scale amax / 448 for each output channel. Norms and router are kept in
    fp32, the embedding in the model's dtype. Beside the weights never more than one tensor is in memory. Raises
    CheckpointError naming every tensor that is missing, or that the model has no place for.
    """
    sizes = {info.name: info.nbytes for info in checkpoint.tensors}
    done = 0
    for filling in fillings(model, checkpoint, weights):
        filling.fill(checkpoint, model.cos_sin.device)
        for name in filling.names:
            done += sizes[name]
            if progress:
                progress(done, checkpoint.total_bytes)


def _names(module: NamedTensor | FusedWeight) -> tuple[str, ...]:
    return (module.name,) if isinstance(module, NamedTensor) else tuple(part.name for part in module.parts)


def _form(infos: Sequence[TensorInfo], weights: WeightFormat | None) -> tuple[torch.dtype, int]:
    """Type and groups of scales of a weight made of these."""
    quantized = infos[0].scales_shape is not None
    if weights == "int8" and not quantized:
        raise CheckpointError(
            f"{infos[0].name} is {infos[0].dtype}, expected int8: weights='int8' keeps released values"
        )
    if weights in _DTYPES:
        return _DTYPES[weights], int(weights == "fp8")
    if quantized:
        return torch.int8, math.lcm(*(info.groups for info in infos))
    return (torch.bfloat16 if infos[0].dtype == "bfloat16" else torch.float32), 0


def _fill(module: FusedWeight, part: Part, source: MappedTensor) -> None:
    """One named matrix, (in, out) or (E, in, out), into its rows; expert by expert, to bound what is in memory."""
    weight_EKN = as_torch(source.weight).view(module.experts, module.k, -1)
    scales_EGN = (
        None if source.scales is None else as_torch(source.scales).view(module.experts, -1, weight_EKN.shape[2])
    )
    for e in range(module.experts):
        scales_GN = None if scales_EGN is None else scales_EGN[e].float()
        scales = module.weight.scales
        if module.weight.dtype == torch.int8:
            assert scales_GN is not None
            assert scales is not None
            repeats = scales.shape[1] // scales_GN.shape[0]
            scales[e, :, part.start : part.stop] = scales_GN.repeat_interleave(repeats, dim=0)
        if module.weight.dtype == torch.int8 or (scales_GN is None and scales is None):
            module.write(e, part.start, weight_EKN[e].t())
        else:
            _convert(module, e, part.start, weight_EKN[e], scales_GN)


def _convert(module: FusedWeight, expert: int, start: int, matrix_KN: Tensor, scales_GN: Tensor | None) -> None:
    """One stored matrix by way of fp32, as many outputs at once as make `CHUNK`."""
    k, n = matrix_KN.shape
    outputs = max(CHUNK // (4 * k) // 64, 1) * 64  # packed rows come by 64
    for at in range(0, n, outputs):
        x_KN = matrix_KN[:, at : at + outputs].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if scales_GN is not None:
            x_KN.view(scales_GN.shape[0], -1, x_KN.shape[1]).mul_(scales_GN[:, None, at : at + outputs])
        first = start + at
        if module.weight.scales is not None:
            scale_N = x_KN.abs().amax(0).clamp_(min=TINY) / FP8_MAX
            module.weight.scales[expert, 0, first : first + x_KN.shape[1]] = scale_N
            x_KN.div_(scale_N).clamp_(-FP8_MAX, FP8_MAX)
        module.write(expert, first, x_KN.to(module.weight.dtype).t())


def export_weights(
    model: Decoder, *, quantized: bool = True, groups: int = 8
) -> Iterator[tuple[str, tuple[Array, Array | None]]]:
    """Every tensor of a float `model` as the release has it: its name, and the (in, out) array with its scales.

    quantized: int8, with `groups` of scales along the input of attention's output and the experts' down projections,
    as in the release; otherwise bf16. Norms, router and embedding stay fp32. ValueError for a model held in 8 bits.
    """
    for module in model.modules():
        if isinstance(module, NamedTensor):
            table = module.values().detach().float()
            yield module.name, ((table.t() if module.transposed else table).contiguous().numpy(), None)
        elif isinstance(module, FusedWeight):
            if module.weight.scales is not None:
                raise ValueError(f"{module.parts[0].name} is {module.weight.dtype} with scales, expected a float model")
            held_ENK = module.matrices().detach()
            for part in module.parts:
                matrices = held_ENK[:, part.start : part.stop].transpose(1, 2).float().contiguous().numpy()
                matrix = matrices[0] if module.experts == 1 else matrices
                if quantized:
                    grouped = part.name.endswith((".o", ".down"))
                    yield part.name, quantize_matrix(matrix, groups if grouped else 1)
                else:
                    yield part.name, (matrix.astype(ml_dtypes.bfloat16), None)
