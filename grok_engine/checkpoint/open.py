"""Which format a folder is in."""

from __future__ import annotations

from pathlib import Path

from grok_engine.config import ModelConfig
from grok_engine.models.families import family_of

from .base import Checkpoint
from .hf.files import config_file
from .hf.reader import HfCheckpoint
from .packed import PackedCheckpoint, is_packed_folder
from .strict_json import read_object
from .xai.reader import XaiCheckpoint


def open_checkpoint(folder: str | Path, config: ModelConfig) -> Checkpoint:
    """The checkpoint of `config` in a folder, whatever its format. CheckpointError with everything that is wrong."""
    folder = Path(folder)
    if is_packed_folder(folder):
        return PackedCheckpoint(folder)
    file = config_file(folder)
    values = read_object(file) if file.exists() else {}
    if family_of(values) is not None:
        return HfCheckpoint(folder, config, values)
    return XaiCheckpoint(folder, config)
