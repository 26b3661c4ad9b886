"""Which format a checkpoint is in."""

from __future__ import annotations

from os.path import lexists  # a dangling link is an error, not no file
from pathlib import Path

from grok_engine.config import ModelConfig
from grok_engine.models.families import family_of

from .base import Checkpoint, reading
from .gguf.files import gguf_file
from .gguf.reader import GGUFCheckpoint
from .hf.files import config_file
from .hf.reader import HfCheckpoint
from .packed import PackedCheckpoint, is_packed_folder
from .strict_json import read_object
from .xai.reader import XaiCheckpoint


def open_checkpoint(path: str | Path, config: ModelConfig) -> Checkpoint:
    """The checkpoint of `config` in a folder, whatever its format, or in a GGUF file. CheckpointError with everything
    that is wrong."""
    path = Path(path)
    with reading(path):
        if is_packed_folder(path):
            return PackedCheckpoint(path)
        if (gguf := gguf_file(path)) is not None:
            return GGUFCheckpoint(gguf, config)
        file = config_file(path)
        values = read_object(file) if lexists(file) else {}
        if family_of(values) is not None:
            return HfCheckpoint(path, config, values)
        return XaiCheckpoint(path, config)
