"""From what a user names to a path, and from the path to its configuration."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.checkpoint.generation import read_generation
from grok_engine.checkpoint.gguf.files import gguf_file
from grok_engine.checkpoint.gguf.reader import read_gguf_config
from grok_engine.checkpoint.hf.files import config_file, is_hf_folder
from grok_engine.checkpoint.strict_json import read_object
from grok_engine.config import ConfigError, ModelConfig, shown
from grok_engine.models.families import family_of, parse_config, preset

from .hub import cached_folder, is_hub_name, model_name, snapshot_of


def resolve_model(model: str | Path) -> Path:
    """The folder of a model, or its GGUF file: a path, the name of the one that ships with the package, `tiny`, or of
    one in the hub's local cache, org/name.

    The folder of the tensors stands for the one that it lies in (`model_folder`).
    """
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError(
            f"model={shown(model)} is neither text nor a path: expected 'tiny' or the path of a checkpoint"
        )
    if str(model) == "tiny":
        return Path(str(files("grok_engine") / "assets" / "tiny"))
    path = Path(model).expanduser()
    if path.is_dir():
        return model_folder(snapshot_of(path))
    if gguf_file(path) is not None:
        return path
    if is_hub_name(model) and path.suffix != ".gguf":
        return cached_folder(str(model))
    raise ConfigError(
        f"model {str(model)!r} is neither a folder nor a .gguf file: expected 'tiny' or the path of a checkpoint"
    )


def find_model(model: str | Path) -> tuple[Path, ModelConfig]:
    """The path of a model and its configuration."""
    folder = resolve_model(model)
    return folder, read_config(folder)


def model_folder(path: str | Path) -> Path:
    """The folder of a checkpoint's configuration and tokenizer: `path`, or its parent where `path` holds the tensors.

    A folder of tensors is recognised by its name, ckpt-0, or by a `config.json` in its parent and none of its own.
    """
    path = Path(path)
    if not path.is_dir() or gguf_file(path) is not None:
        return path
    inner = not (path / "config.json").is_file() and not (path / "ckpt-0").is_dir()
    above = path.absolute().parent
    return above if inner and (path.absolute().name == "ckpt-0" or (above / "config.json").is_file()) else path


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint: its `config.json`, in the keys of any family or of `ModelConfig`, or the
    metadata of a GGUF file.

    The release carries none: a folder without one is Grok-1 itself. CheckpointError names the file and what is wrong.
    Tokens that end an answer may also stand in a `generation_config.json` of the hub.
    """
    if (gguf := gguf_file(path)) is not None:
        return read_gguf_config(gguf)
    path = model_folder(path)
    file = config_file(path)
    if not os.path.lexists(file):
        if is_hf_folder(path):
            raise CheckpointError(f"{path} holds safetensors: expected a config.json with `architectures` beside them")
        return preset("grok-1")
    values = read_object(file)
    try:
        config = parse_config(values, model_name(path))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if family_of(values) is None:  # a conversion's, which has the tokens of both files
        return config
    more, generation = read_generation(path)
    found = generation.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    try:
        return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ids))))
    except (ConfigError, TypeError):
        raise CheckpointError(f"{more}: eos_token_id={found!r} is not a token or a list of tokens") from None
