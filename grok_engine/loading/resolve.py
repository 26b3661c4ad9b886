"""From what a user names to a folder, and from the folder to its configuration."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.checkpoint.strict_json import read_object
from grok_engine.config import ConfigError, ModelConfig
from grok_engine.models.families import parse_config, preset


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


def find_model(model: str | Path) -> tuple[Path, ModelConfig]:
    """The folder of a model and its configuration."""
    folder = resolve_model(model)
    return folder, read_config(folder)


def model_folder(path: str | Path) -> Path:
    """The folder of a checkpoint's configuration and tokenizer: `path`, or its parent where `path` holds the tensors.

    A folder of tensors is recognised by its name, ckpt-0, or by a `config.json` in its parent and none of its own.
    """
    path = Path(path)
    inner = not (path / "config.json").is_file() and not (path / "ckpt-0").is_dir()
    above = path.absolute().parent
    return above if inner and (path.absolute().name == "ckpt-0" or (above / "config.json").is_file()) else path


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint folder: its `config.json`, in the keys of any family or of `ModelConfig`.

    The release carries none: a folder without one is Grok-1 itself. CheckpointError names the file and what is wrong.
    """
    path = model_folder(path)
    file = path / "config.json"
    if not file.exists():
        return preset("grok-1")
    values = read_object(file)
    try:
        return parse_config(values, path.name)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
