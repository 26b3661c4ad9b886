"""Convert a checkpoint to packed weights: written once, then read or mapped as they are.

The file holds the weights as the CPU kernels want them in memory, fused and in panels, under the names of the model's
modules. Loading is then reading, at the speed of the disk or of the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

import grok_kernels
from grok_engine.checkpoint.base import Checkpoint, total_bytes
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.packed import FILE, Plane, arrange, header, is_packed_folder
from grok_engine.config import ConfigError, DType, WeightFormat
from grok_engine.models.decoder import Decoder
from grok_engine.tokenizer.load import tokenizer_files
from grok_kernels.dtypes import dtype_of

from .fill import Progress, load
from .resolve import read_config, resolve_model
from .slots import Slot, slots


def convert(
    model: str | Path,
    out: str | Path,
    *,
    weights: WeightFormat | None = None,
    dtype: DType = "bfloat16",
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint `model` as the folder `out`, which must not exist; returns its path.

    weights: as for `fill`; None keeps released int8 values and scales, bit for bit. dtype: of the computation that the
    folder is for, in which the embedding is held. Only one module's weight is in memory at a time. The folder gets its
    name once it is complete; a conversion that fails leaves nothing behind.
    """
    path, out = resolve_model(model), Path(out).expanduser().absolute()
    if is_packed_folder(path):
        raise ConfigError(f"{path} is converted already: expected a checkpoint as released")
    if out.exists() or not out.parent.is_dir():
        what = "exists" if out.exists() else f"has no folder {out.parent} to be in"
        raise ConfigError(f"{out} {what}: expected a new name in a folder that is there")
    config = read_config(path)
    checkpoint = open_checkpoint(path, config)
    decoder = Decoder(config, dtype_of(dtype), max_positions=1)
    found = slots(decoder, checkpoint, weights)
    planes = arrange(plane for slot in found for plane in _planes(slot))
    head = header(planes, {s.path: s.shape for s in found if _layout(s) == "panels"}, config.name)
    need, free = len(head) + sum(plane.nbytes for plane in planes) + (1 << 20), shutil.disk_usage(out.parent).free
    if need > free:
        raise ConfigError(f"{out} needs {need:,} bytes, {free:,} are free there")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
        for name, content in tokenizer_files(path).items():
            (partial / name).write_bytes(content)
        _write(partial / FILE, head, planes, found, checkpoint, progress)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _planes(slot: Slot) -> Iterator[Plane]:
    yield Plane(f"{slot.path}.weight", slot.format, slot.module.shape_in(_layout(slot), slot.dtype))
    if slot.groups:
        yield Plane(f"{slot.path}.scale", "fp32", (slot.shape[0], slot.groups, slot.shape[1]))


def _layout(slot: Slot) -> grok_kernels.Layout:
    return slot.module.layout_for(slot.dtype, "cpu", packed=True)


def _write(
    path: Path, head: bytes, planes: list[Plane], found: list[Slot], checkpoint: Checkpoint, progress: Progress | None
) -> None:
    starts = {plane.name: len(head) + plane.start for plane in planes}
    done, total = 0, total_bytes(checkpoint)
    with path.open("wb") as file:
        file.write(head)
        for slot in found:
            load(slot, checkpoint, "cpu", packed=True)
            for plane, tensor in zip(_planes(slot), slot.module.parameters(), strict=True):
                file.seek(starts[plane.name])
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            slot.module.release()
            done += sum(info.nbytes for info in slot.sources)
            if progress:
                progress(done, total)
        file.flush()
        os.fsync(file.fileno())
