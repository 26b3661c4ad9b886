"""Which format a folder is in."""

from __future__ import annotations

from pathlib import Path

from grok_engine.config import ModelConfig

from .base import Checkpoint
from .packed import PackedCheckpoint, is_packed_folder
from .xai.reader import XaiCheckpoint


def open_checkpoint(folder: str | Path, config: ModelConfig) -> Checkpoint:
    """The checkpoint of `config` in a folder, whatever its format. CheckpointError with everything that is wrong."""
    return PackedCheckpoint(folder) if is_packed_folder(folder) else XaiCheckpoint(folder, config)
