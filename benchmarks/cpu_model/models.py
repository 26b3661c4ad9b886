"""The models that are run: one random model in several files, and what a step reads of any file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.model_1b import configuration, write
from grok_engine import ModelConfig
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.config import WeightFormat
from grok_engine.loading.convert import convert

KINDS: dict[str, WeightFormat] = {"Q8_0": "int8", "BF16": "bf16"}  # types of GGUF files, by llama.cpp's names


def small_configuration() -> ModelConfig:
    return replace(configuration(2), vocab_size=512, d_model=256, num_heads=2, num_kv_heads=1, d_ff=512)


def write_models(folder: Path, config: ModelConfig, kinds: Sequence[str]) -> dict[str, Path]:
    """Write what is missing: `xai`, the same converted to `packed`, and a GGUF file of each kind. The files by kind."""
    marker = folder / "written.json"
    same = json.dumps(config.to_dict())
    if marker.is_file() and marker.read_text() != same:
        raise ValueError(f"--dir {folder} holds another model: give an empty folder")
    if not marker.is_file():
        write(folder / "xai", config)
        marker.write_text(same)
    if not (folder / "packed").is_dir():
        convert(folder / "xai", folder / "packed")
    files = {kind: folder / f"{kind}.gguf" for kind in kinds}
    for kind, file in files.items():
        if not file.is_file():
            convert(folder / "xai", file, format="gguf", weights=KINDS[kind])
    return files


@dataclass(frozen=True)
class Sizes:
    """What a step reads of a model's file and computes. experts: bytes of all of them; hit: the share that a token's
    are; layers, head: parameters that a token meets; formats: of matrices, the one with the most bytes first."""

    dense: int
    experts: int
    hit: float
    layers: int
    head: int
    formats: str

    def read(self, rows: int) -> float:
        """Bytes that a step of so many tokens reads, whose experts are drawn evenly and independently."""
        return self.dense + self.experts * (1 - (1 - self.hit) ** rows)


def sizes(path: Path, config: ModelConfig) -> Sizes:
    """Of a checkpoint. Of an embedding that is not the head, too, a step reads a row for each token: nothing."""
    dense, experts, formats = 0, 0, Counter[str]()
    for name, info in open_checkpoint(path, config).tensors.items():
        if name.startswith("embed") and not config.tie_embeddings:
            continue
        if config.num_experts and len(info.shape) == 3:
            experts += info.nbytes
        else:
            dense += info.nbytes
        if len(info.shape) > 1:
            formats[info.format] += info.nbytes
    total = sum(formats.values())
    shown = ", ".join(f"{name} {size / total:.0%}" for name, size in formats.most_common() if size > 0.005 * total)
    hit = config.num_experts_per_tok / config.num_experts if config.num_experts else 1.0
    head = config.vocab_size * config.d_model
    layers = config.active_param_count() - head * (1 if config.tie_embeddings else 2)
    return Sizes(dense, experts, hit, layers, head, shown)
