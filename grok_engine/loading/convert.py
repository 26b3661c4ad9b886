"""Convert a checkpoint: to packed weights, a folder of the hub, or a GGUF file.

Packed weights lie as the CPU kernels want them in memory, fused and in panels, under the names of the model's modules.
Loading is then reading, at the speed of the disk or of the page cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from grok_engine.checkpoint.base import Checkpoint
from grok_engine.checkpoint.generation import FILE as GENERATION
from grok_engine.checkpoint.generation import generation_metadata
from grok_engine.checkpoint.gguf.writer import gguf_model
from grok_engine.checkpoint.hf.writer import hf_files
from grok_engine.checkpoint.new_file import NewFile, Part, raw
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.packed import FILE, PackedCheckpoint, Plane, Stored, arrange, header
from grok_engine.checkpoint.strict_json import read_object
from grok_engine.checkpoint.widened import WidenedCheckpoint
from grok_engine.config import ConfigError, DType, ModelConfig, WeightFormat
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.models.decoder import Decoder
from grok_engine.tokenizer.gguf_metadata import tokenizer_metadata
from grok_engine.tokenizer.load import tokenizer_files
from grok_kernels import Layout, Spec
from grok_kernels.dtypes import DTYPES, dtype_of

from .fill import Progress, load
from .partial import check_new, write_new
from .resolve import read_config, resolve_model
from .slots import Slot, served, slots
from .unfused import UnfusedCheckpoint

FileFormat = Literal["packed", "hf", "gguf"]
# Files of transformers' tokenizers and chat templates that a conversion copies, beside those of `tokenizer_files`.
COMPANIONS = (
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


def convert(
    model: str | Path,
    out: str | Path,
    *,
    format: FileFormat = "packed",
    weights: WeightFormat | None = None,
    dtype: DType = "bfloat16",
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint `model` as `out`, which must not exist; returns its path.

    format: "packed", for this engine on a CPU; "hf", a folder as the hub has it; "gguf", a file `out` for llama.cpp.
    weights: None loses nothing that the format can hold (`fill`, `hf_files`, `gguf_model`); others round. dtype: of the
    computation that a packed folder is for, in which the embedding is held. Besides what is mapped, at most one tensor
    is in memory, of a packed folder one module's weight. `out` gets its name once it is complete; a conversion that
    fails leaves nothing behind (`write_new`). progress: bytes written, and in all.
    """
    path, out = resolve_model(model), Path(out).expanduser().absolute()
    check_new(out, path)
    config = read_config(path)
    checkpoint = open_checkpoint(path, config)
    decoder = Decoder(config, dtype_of(dtype), max_positions=1)
    if isinstance(checkpoint, PackedCheckpoint):
        stored = decoder_of(config, checkpoint)
        slots(stored, checkpoint)
        checkpoint = UnfusedCheckpoint(checkpoint, stored)
    checkpoint = served(checkpoint, weights, "cpu") if format == "packed" else _written(checkpoint)
    found = slots(decoder, checkpoint, weights)
    if format == "gguf":
        if out.suffix != ".gguf":
            raise ConfigError(f"{out}: expected the name of a file that ends in .gguf")
        tokenizer = tokenizer_metadata(path, config.vocab_size) | generation_metadata(path)
        write_new(out, [gguf_model(checkpoint, config, tokenizer, weights)], {}, progress, single=True)
        return out
    if out.suffix == ".gguf":
        raise ConfigError(f"{out}: expected the name of a folder for format {format!r}, or format 'gguf'")
    companions = _companions(path)
    if format == "hf":
        files, small = hf_files(checkpoint, config, _source(path), weights)
        small = {**companions, **_generation(config, companions.get(GENERATION, b"{}")), **small}
    else:
        files = [_packed_file(config, found, checkpoint)]
        small = {**companions, "config.json": (json.dumps(config.to_dict(), indent=1) + "\n").encode()}
    write_new(out, files, small, progress)
    return out


def _written(checkpoint: Checkpoint) -> Checkpoint:
    """In the formats that files of other tools are written in."""
    return WidenedCheckpoint(checkpoint, lambda info: info.format == "int4")


def decoder_of(config: ModelConfig, checkpoint: PackedCheckpoint) -> Decoder:
    """A model whose modules a converted checkpoint holds: its embedding has the dtype that it was converted for."""
    embed = checkpoint.tensors.get("embed")
    floats = embed is not None and embed.format in DTYPES and embed.block is None
    return Decoder(config, dtype_of(embed.format if embed is not None and floats else "fp32"), max_positions=1)


def _companions(path: Path) -> dict[str, bytes]:
    """The tokenizer, its chat template and the defaults of generation."""
    found = {name: file.read_bytes() for name in COMPANIONS if (file := path / name).is_file()}
    return found | tokenizer_files(path)


def _source(path: Path) -> Mapping[str, Any]:
    """The values of a folder's `config.json`; none of one with Mistral's own `params.json` alone."""
    file = path / "config.json"
    return read_object(file) if file.is_file() else {}


def _generation(config: ModelConfig, said: bytes) -> dict[str, bytes]:
    """generation_config.json with the tokens that end an answer. said: what a folder's own says."""
    values = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids), **json.loads(said)}
    return {GENERATION: (json.dumps(values, indent=2) + "\n").encode()}


def _packed_file(config: ModelConfig, found: list[Slot], checkpoint: Checkpoint) -> NewFile:
    planes = {slot.path: _planes(slot) for slot in found}
    arranged = arrange(plane for own in planes.values() for plane in own)
    stored = {
        slot.path: Stored(slot.spec.format, _layout(slot.module, slot.spec), slot.module.shape)
        for slot in found
        if isinstance(slot.module, FusedWeight)
    }
    head = header(arranged, stored, config.name)
    starts = {plane.name: len(head) + plane.start for plane in arranged}

    def body() -> Iterator[Part]:
        for slot in found:
            load(slot, checkpoint, "cpu", packed=True)
            for plane, tensor in zip(planes[slot.path], slot.module.parameters(), strict=True):
                yield starts[plane.name], raw(tensor)
            slot.module.release()

    return NewFile(FILE, head, len(head) + sum(plane.nbytes for plane in arranged), body)


def _planes(slot: Slot) -> list[Plane]:
    module = slot.module
    if isinstance(module, NamedTensor):
        return [Plane(f"{slot.path}.weight", torch.float32, module.shape)]
    planes = slot.spec.planes(_layout(module, slot.spec), module.shape)
    return [Plane(f"{slot.path}.{name}", dtype, shape) for name, (shape, dtype) in planes.items()]


def _layout(module: FusedWeight, spec: Spec) -> Layout:
    return module.layout_for(spec, "cpu", packed=True)
