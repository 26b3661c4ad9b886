"""Models in the local cache of the Hugging Face hub, by the names that they have there."""

from __future__ import annotations

import re
from pathlib import Path

from grok_engine.config import ConfigError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--(.+?)--(.+)")


def is_hub_name(model: str | Path) -> bool:
    """Whether this may be a name such as org/name."""
    return _NAME.fullmatch(str(model)) is not None


def cached_folder(name: str) -> Path:
    """The folder of a model in the hub's local cache. Nothing is downloaded.

    ConfigError where it is not there, or `huggingface_hub` is not installed (the extra `hub`).
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigError(
            f"model {name!r} is not a folder; to find it in the hub's cache, pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise ConfigError(
            f"model {name!r} is neither a folder nor in the hub's cache: `hf download {name}` puts it there, "
            "nothing is downloaded here"
        ) from None


def snapshot_of(folder: Path) -> Path:
    """The snapshot that a model's folder in the hub's cache, models--org--name, has as its main one; else `folder`.

    ConfigError where the cache does not have it.
    """
    ref = folder / "refs" / "main"
    if not _CACHED.fullmatch(folder.absolute().name) or not (folder / "snapshots").is_dir():
        return folder
    name = ref.read_text(encoding="utf-8", errors="replace")[:64].strip() if ref.is_file() else None
    if name is None or name in ("", ".", "..") or "/" in name or not (folder / "snapshots" / name).is_dir():
        said = "there is no refs/main" if name is None else f"refs/main names {name!r}, which is not in snapshots/"
        raise ConfigError(f"{folder} is a folder of the hub's cache, and {said}: expected the path of a snapshot in it")
    return folder / "snapshots" / name


def model_name(folder: Path) -> str:
    """What to call the model in a folder: its name, or org/name for a snapshot of the hub's cache."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and (match := _CACHED.fullmatch(folder.parent.parent.name)):
        return f"{match[1]}/{match[2]}"
    return folder.name
