"""A model in the engine's own format: written once from a checkpoint, then read or mapped as it is.

The weights lie in the file as the kernels want them in memory, packed and with fused parts together, under the names
that the modules of the model have. So loading is reading, as fast as the disk or the page cache is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import grok_kernels
from grok_engine.checkpoint.packed import FILE, PackedCheckpoint, PackedInfo, arrange, header, is_packed_folder
from grok_engine.checkpoint.xai.reader import CheckpointError, XaiCheckpoint
from grok_engine.config import ConfigError, DType, ModelConfig, WeightFormat
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.models.decoder import Decoder

from .load import Filling, Progress, fillings, resolve_model

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
NAMES = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
FORMATS: dict[WeightFormat, str] = {"int8": "I8", "fp8": "F8_E4M3", "bf16": "BF16", "fp32": "F32"}


def convert(
    model: str | Path,
    out: str | Path,
    *,
    weights: WeightFormat | None = None,
    dtype: DType = "bfloat16",
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint `model` as the folder `out`, which must not exist; returns its path.

    `weights` as for `load_weights`: None keeps released int8 values and scales, bit for bit. dtype: of the computation
    that the folder is for, since the embedding is held in it. Beside one module's weight little is in memory. The
    folder appears under its name when it is whole; whatever stops the conversion, nothing is left of it.
    """
    path, out = resolve_model(model), Path(out).expanduser().absolute()
    if is_packed_folder(path):
        raise ConfigError(f"{path} is converted already: expected a checkpoint as released")
    if out.exists() or not out.parent.is_dir():
        what = "exists" if out.exists() else f"has no folder {out.parent} to be in"
        raise ConfigError(f"{out} {what}: expected a new name in a folder that is there")
    config = ModelConfig.from_pretrained(path)
    checkpoint = XaiCheckpoint(path, config)
    decoder = Decoder(config, getattr(torch, dtype), max_positions=1)
    filled = fillings(decoder, checkpoint, weights)
    infos = arrange(tensor for filling in filled for tensor in _tensors(filling))
    start = header(infos, {"model": config.name})
    need, free = len(start) + sum(info.nbytes for info in infos) + (1 << 20), shutil.disk_usage(out.parent).free
    if need > free:
        raise ConfigError(f"{out} needs {need:,} bytes, {free:,} are free there")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
        for name in TOKENIZERS:
            if (path / name).is_file():
                shutil.copy(path / name, partial)
        _write(partial / FILE, start, infos, filled, checkpoint, progress)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _tensors(filling: Filling) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    module = filling.module
    layout = module.layout_for(filling.dtype, "cpu", packed=True)
    yield f"{filling.path}.weight", NAMES[filling.dtype], module.shape_in(layout, filling.dtype)
    if isinstance(module, FusedWeight) and filling.groups:
        yield f"{filling.path}.scale", "F32", (module.experts, filling.groups, module.n)


def _write(
    path: Path,
    start: bytes,
    infos: list[PackedInfo],
    filled: list[Filling],
    checkpoint: XaiCheckpoint,
    progress: Progress | None,
) -> None:
    places = {info.name: info for info in infos}
    sizes = {info.name: info.nbytes for info in checkpoint.tensors}
    done = 0
    with path.open("wb") as file:
        file.write(start)
        for filling in filled:
            filling.fill(checkpoint, "cpu", packed=True)
            for name, tensor in zip(("weight", "scale"), filling.module.parameters(), strict=False):
                file.seek(len(start) + places[f"{filling.path}.{name}"].start)
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            filling.module.release()
            done += sum(sizes[name] for name in filling.names)
            if progress:
                progress(done, checkpoint.total_bytes)
        file.flush()
        os.fsync(file.fileno())


def load_packed(
    model: Decoder,
    checkpoint: PackedCheckpoint,
    *,
    weights: WeightFormat | None = None,
    mapped: bool = False,
    progress: Progress | None = None,
) -> None:
    """Fill `model` from a folder that `convert` wrote.

    On a CPU the weights are one block of memory, read in whole, or with `mapped` the file itself, whose pages come when
    they are used and may be dropped again. Other devices, and kernels that do not want the packed form, get the plain
    one, tensor by tensor. Raises CheckpointError with everything that does not fit `model`, or is not in `weights`.
    """
    infos = {info.name: info for info in checkpoint.tensors}
    modules = {path: m for path, m in model.named_modules() if isinstance(m, (NamedTensor, FusedWeight))}
    problems = tuple(_problems(model, modules, infos, weights))
    if problems:
        raise CheckpointError("\n  ".join([f"{checkpoint.path} does not hold the model:", *problems]), problems)
    device = model.cos_sin.device
    as_it_is = device.type == "cpu" and (mapped or all(_wanted(m, infos[f"{p}.weight"]) for p, m in modules.items()))
    if as_it_is and not mapped:
        data = grok_kernels.huge_pages(checkpoint.total_bytes)
        checkpoint.read_into(data.numpy().data, progress)
    else:
        data = torch.frombuffer(checkpoint.map(), dtype=torch.uint8)
    done = 0

    def read(info: PackedInfo) -> Tensor:
        return data[info.start : info.start + info.nbytes].view(DTYPES[info.dtype]).view(info.shape)

    for path, module in sorted(modules.items(), key=lambda item: infos[f"{item[0]}.weight"].start):
        info, scale = infos[f"{path}.weight"], infos.get(f"{path}.scale")
        scales = read(scale) if scale else None
        _hold(module, read(info), scales, _layout(module, info), None if as_it_is else device)
        done += info.nbytes + (scale.nbytes if scale else 0)
        if progress and not (as_it_is and not mapped):
            progress(done, checkpoint.total_bytes)


def _layout(module: NamedTensor | FusedWeight, info: PackedInfo) -> grok_kernels.Layout:
    dtype = DTYPES[info.dtype]
    return "rows" if info.shape == module.shape_in("rows", dtype) else "panels"


def _wanted(module: NamedTensor | FusedWeight, info: PackedInfo) -> bool:
    return _layout(module, info) == module.layout_for(DTYPES[info.dtype], "cpu")


def _hold(
    module: NamedTensor | FusedWeight,
    values: Tensor,
    scales: Tensor | None,
    layout: grok_kernels.Layout,
    device: torch.device | None,
) -> None:
    """Give the module its weight as the file has it or, with a device, a copy in rows there."""
    if isinstance(module, NamedTensor):
        module.hold(values, layout)
        if device is not None:
            module.hold(module.values().to(device, copy=True))
        return
    weight = grok_kernels.Weight.of(values, scales, layout)
    if device is not None:
        values = weight.with_layout("rows").values.to(device, copy=True)
        weight = grok_kernels.Weight.of(values, None if scales is None else scales.to(device, copy=True))
    module.hold(weight)


def _problems(
    model: Decoder,
    modules: dict[str, NamedTensor | FusedWeight],
    infos: dict[str, PackedInfo],
    weights: WeightFormat | None,
) -> Iterator[str]:
    wanted = {f"{path}.weight" for path in modules}
    scales = {f"{path}.scale" for path, m in modules.items() if isinstance(m, FusedWeight)}
    if missing := sorted(wanted - infos.keys()):
        yield f"missing tensors {missing}"
    if unused := sorted(infos.keys() - wanted - scales):
        yield f"tensors without a place {unused}"
    for path, module in modules.items():
        info, scale = infos.get(f"{path}.weight"), infos.get(f"{path}.scale")
        if info is None:
            continue
        dtype = NAMES[model.dtype] if isinstance(module, Embedding) else "F32"
        if isinstance(module, FusedWeight):
            dtype = FORMATS[weights] if weights else info.dtype
            yield from _scale_problems(path, module, info, scale)
        if info.dtype != dtype:
            yield f"{info.name} is {info.dtype}, expected {dtype}: other weights or another dtype take a new conversion"
        held = DTYPES[info.dtype]
        forms = {module.shape_in(module.layout_for(held, "cpu", packed), held) for packed in (True, False)}
        if info.shape not in forms:
            yield f"{info.name} has shape {info.shape}, expected {' or '.join(map(str, sorted(forms)))}"


def _scale_problems(path: str, module: FusedWeight, info: PackedInfo, scale: PackedInfo | None) -> Iterator[str]:
    quantized = info.dtype in ("I8", "F8_E4M3")
    if quantized != (scale is not None):
        yield f"{info.name} is {info.dtype} {'without' if quantized else 'with'} {path}.scale"
    elif scale is not None:
        groups = scale.shape[1] if len(scale.shape) == 3 else 0
        if scale.dtype != "F32" or scale.shape != (module.experts, groups, module.n) or groups < 1 or module.k % groups:
            yield (
                f"{scale.name} is {scale.dtype} {scale.shape}, expected F32 ({module.experts}, groups, {module.n}) "
                f"with groups that divide {module.k}"
            )
