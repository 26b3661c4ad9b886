"""Which files make up a model in GGUF: one, or several that a name like NAME-00001-of-00003.gguf counts."""

from __future__ import annotations

import re
from pathlib import Path

from grok_engine.checkpoint.base import CheckpointError, all_problems

from .header import Header, read_header

MAX_FILES = 1000
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder, of a split one the first. None for a folder
    without any, or with weights in another format. CheckpointError for a folder with several.
    """
    path = Path(path)
    if not path.is_dir():
        return path if path.suffix == ".gguf" and path.is_file() else None
    if (path / "ckpt-0").is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(file for file in path.glob("*.gguf") if file.is_file())
    models = {match[1] if (match := _SPLIT.fullmatch(file.name)) else file.name: file for file in reversed(found)}
    if len(models) > 1:
        names = ", ".join(sorted(file.name for file in models.values()))
        raise CheckpointError(f"{path} holds several GGUF files, {names}: expected one, or the path of one of them")
    return next(iter(models.values()), None)


# What was read last. Configuration, tokenizer and tensors are read one after the other, and each asks for the headers:
# parsing a vocabulary takes some 0.1 s for 100,000 strings.
_last: dict[Path, tuple[Header, ...]] = {}


def read_headers(path: Path) -> tuple[Header, ...]:
    """The headers of a file, or of all files of a split one, whose first has the metadata. CheckpointError if any is
    missing, or not what its name says. They are kept for the next call until `forget_headers`."""
    headers = _last.get(path)
    if headers is None or not all(header.is_current() for header in headers):
        headers = _read_headers(path)
        _last.clear()
        _last[path] = headers
    return headers


def forget_headers() -> None:
    """Let go of the headers that were read last."""
    _last.clear()


def _read_headers(path: Path) -> tuple[Header, ...]:
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        header = read_header(path)
        if (count := header.metadata.get("split.count", 1)) not in (0, 1):
            raise CheckpointError(f"{path}: split.count={count}, expected a name like NAME-00001-of-{count:05d}.gguf")
        return (header,)
    count = int(match[3])
    if count > MAX_FILES:
        raise CheckpointError(f"{path} is one of {count} files, expected at most {MAX_FILES}")
    paths = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, count + 1)]
    missing = [f"{file.name} is missing" for file in paths if not file.is_file()]
    if missing or not count:
        raise all_problems(f"{path} is one of {count} files:", missing)
    headers = tuple(map(read_header, paths))
    problems = []
    for number, header in enumerate(headers):
        found = {key: header.metadata.get(f"split.{key}") for key in ("no", "count")}
        if found != {"no": number, "count": count}:
            problems.append(f"{header.path.name} says split {found}, expected no {number} of count {count}")
    names = [name for header in headers for name in header.tensors]
    problems += [f"tensor {name!r} is in two files" for name in sorted({n for n in names if names.count(n) > 1})]
    if (total := headers[0].metadata.get("split.tensors.count", len(names))) != len(names):
        problems.append(f"split.tensors.count={total}, found {len(names)} tensors")
    if problems:
        raise all_problems(f"{path} and the files beside it do not fit:", problems)
    return headers
