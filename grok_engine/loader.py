"""From a checkpoint's named tensors to a decoder's weights, and back; one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from .checkpoint.pickles import Array
from .checkpoint.quantize import quantize_matrix
from .checkpoint.xai import CheckpointError, MappedTensor, XaiCheckpoint
from .config import ConfigError, WeightFormat, model_folder
from .layers.embedding import Embedding
from .layers.weight import Part, Table, Weight
from .models.decoder import Decoder

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_DTYPES: dict[WeightFormat, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


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


def load_weights(
    model: Decoder,
    checkpoint: XaiCheckpoint,
    *,
    weights: WeightFormat | None = None,
    progress: Progress | None = None,
) -> None:
    """Fill `model` from `checkpoint`, on the device of `model`.

    `weights` None keeps each matrix as the checkpoint has it, int8 bit for bit; bf16 and fp32 dequantise. Norms and
    router are kept in fp32, the embedding in the model's dtype. Beside the weights never more than one tensor is in
    memory. Raises CheckpointError naming every tensor that is missing, or that the model has no place for.
    """
    infos = {info.name: info for info in checkpoint.tensors}
    modules = [m for m in model.modules() if isinstance(m, (Table, Weight))]
    wanted = {name for m in modules for name in ([m.name] if isinstance(m, Table) else [p.name for p in m.parts])}
    if wanted != infos.keys():
        missing, unused = sorted(wanted - infos.keys()), sorted(infos.keys() - wanted)
        raise CheckpointError(f"{checkpoint.folder}: missing tensors {missing}, tensors without a place {unused}")
    device = model.cos_sin.device
    done = 0
    for module in modules:
        if isinstance(module, Table):
            module.allocate(model.dtype if isinstance(module, Embedding) else torch.float32, device)
            source = as_torch(checkpoint.read(module.name).weight)
            module.weight.copy_(source.t() if module.transposed else source)
            names = [module.name]
        else:
            names = [part.name for part in module.parts]
            formats = {infos[name].dtype for name in names}
            if len(formats) > 1:
                raise CheckpointError(f"{checkpoint.folder}: {', '.join(names)} are fused, but have types {formats}")
            _allocate(module, checkpoint, names, weights, device)
            for part in module.parts:
                _fill(module, part, checkpoint.read(part.name))
        for name in names:
            done += infos[name].nbytes
            if progress:
                progress(done, checkpoint.total_bytes)


def _allocate(
    module: Weight, checkpoint: XaiCheckpoint, names: list[str], weights: WeightFormat | None, device: torch.device
) -> None:
    infos = [info for info in checkpoint.tensors if info.name in names]
    quantized = infos[0].scales_shape is not None
    if weights == "int8" and not quantized:
        raise CheckpointError(f"{names[0]} is {infos[0].dtype}, expected int8: weights='int8' keeps released values")
    if weights in _DTYPES:
        module.allocate(_DTYPES[weights], 0, device)
    elif quantized:
        groups = math.lcm(*(info.scales_shape[-2] for info in infos if info.scales_shape))
        module.allocate(torch.int8, groups, device)
    else:
        module.allocate(torch.bfloat16 if infos[0].dtype == "bfloat16" else torch.float32, 0, device)


def _fill(module: Weight, part: Part, source: MappedTensor) -> None:
    """One named matrix, (in, out) or (E, in, out), into its rows; expert by expert, to bound what is in memory."""
    weight_EKN = as_torch(source.weight).view(module.experts, module.k, -1)
    scales_EGN = (
        None if source.scales is None else as_torch(source.scales).view(module.experts, -1, weight_EKN.shape[2])
    )
    rows = slice(part.start, part.stop)
    for e in range(module.experts):
        matrix = weight_EKN[e]
        if scales_EGN is not None and module.scale is not None:
            scales = scales_EGN[e].float()
            module.scale[e, :, rows] = scales.repeat_interleave(module.scale.shape[1] // scales.shape[0], dim=0)
        elif scales_EGN is not None:
            scales = scales_EGN[e].float()
            matrix = (matrix.float().view(scales.shape[0], -1, matrix.shape[1]) * scales[:, None]).view_as(matrix)
        module.weight[e, rows].copy_(matrix.t())


def export_weights(
    model: Decoder, *, quantized: bool = True, groups: int = 8
) -> Iterator[tuple[str, tuple[Array, Array | None]]]:
    """Every tensor of a float `model` as the release has it: its name, and the (in, out) array with its scales.

    quantized: int8, with `groups` of scales along the input of attention's output and the experts' down projections,
    as in the release; otherwise bf16. Norms, router and embedding stay fp32. ValueError for a model held in 8 bits.
    """
    for module in model.modules():
        if isinstance(module, Table):
            table = module.weight.detach().float()
            yield module.name, ((table.t() if module.transposed else table).contiguous().numpy(), None)
        elif isinstance(module, Weight):
            if module.scale is not None:
                raise ValueError(f"{module.parts[0].name} is {module.weight.dtype} with scales, expected a float model")
            for part in module.parts:
                matrices = (
                    module.weight.detach()[:, part.start : part.stop].transpose(1, 2).float().contiguous().numpy()
                )
                matrix = matrices[0] if module.experts == 1 else matrices
                if quantized:
                    grouped = part.name.endswith((".o", ".down"))
                    yield part.name, quantize_matrix(matrix, groups if grouped else 1)
                else:
                    yield part.name, (matrix.astype(ml_dtypes.bfloat16), None)
