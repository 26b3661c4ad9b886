"""Which files of a folder hold its tensors."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.checkpoint.safetensors import SafetensorsFile, StoredTensor
from grok_engine.checkpoint.strict_json import read_object

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONSOLIDATED, PARAMS = "consolidated.safetensors", "params.json"  # Mistral's own
CONSOLIDATED_INDEX = f"{CONSOLIDATED}.index.json"
_NUMBERED = re.compile(r"(model|consolidated)-(\d{5})-of-(\d{5})\.safetensors")
_PIECES = re.compile(r"consolidated\.\d\d\.safetensors")  # for the ranks of a tensor-parallel group
_RANKED = re.compile(r"pytorch_model-\d{5}-TP-(common|\d{3})\.safetensors")  # Grok-2's
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated.*.pth")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies. rank: of the piece of it that a file for one rank of a tensor-parallel group holds."""

    file: SafetensorsFile
    tensor: StoredTensor
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Files:
    """The tensors of a folder by their files' names, in pieces in the order of ranks, and what is wrong with them."""

    places: dict[str, list[Place]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, path: Path, rank: int | None = None) -> SafetensorsFile | None:
        try:
            file = SafetensorsFile(path)
        except CheckpointError as error:
            self.problems.append(str(error))
            return None
        for name, tensor in file.tensors.items():
            found = self.places.setdefault(name, [])
            if other := next(
                (place for place in found if place.rank is None or place.rank == rank or rank is None), None
            ):
                self.problems.append(f"{name} is in {other.file.path.name} and in {path.name}: expected it once")
            else:
                found.append(Place(file, tensor, rank))
        return file


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds safetensors files, or says that it should."""
    return any(folder.glob("*.safetensors")) or any((folder / name).exists() for name in (INDEX, CONSOLIDATED_INDEX))


def open_files(folder: Path) -> Files:
    """The files that an index names, else `model.safetensors`, numbered ones, Grok-2's for ranks, or Mistral's own."""
    files = Files()
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        _add_indexed(files, folder, INDEX)
        if SINGLE in names and not any(p.file.path.name == SINGLE for places in files.places.values() for p in places):
            files.problems.append(f"{SINGLE} lies beside {INDEX}, which does not name it: expected one of the two")
    elif SINGLE in names:
        files.add(folder / SINGLE)
    elif (folder / CONSOLIDATED_INDEX).exists() and not any(name.startswith("model-") for name in names):
        _add_indexed(files, folder, CONSOLIDATED_INDEX)
    elif numbered := _numbered(names):
        stem, totals = numbered[0][1], {int(match[3]) for match in numbered}
        expected = {f"{stem}-{i:05d}-of-{max(totals):05d}.safetensors" for i in range(1, min(max(totals), 9999) + 1)}
        found = {match[0] for match in numbered}
        for what, these in (("missing", expected - found), ("unexpected", found - expected)):
            if these:
                files.problems.append(f"{what} {some(these)}: expected {max(totals)} numbered files")
        for name in sorted(found):
            files.add(folder / name)
    elif ranked := [match for name in names if (match := _RANKED.fullmatch(name))]:
        for match in sorted(ranked, key=lambda match: match[1]):
            files.add(folder / match[0], None if match[1] == "common" else int(match[1]))
    elif CONSOLIDATED in names:
        files.add(folder / CONSOLIDATED)
    elif len(pieces := [name for name in names if _PIECES.fullmatch(name)]) > 1:
        files.problems.append(
            f"found {some(pieces)}: pieces of every matrix, and no file says how they were cut. Expected "
            f"{CONSOLIDATED}, or files that {INDEX} names"
        )
    elif len(names) == 1 and not names[0].startswith("adapter"):  # as old tools named a quantised model
        files.add(folder / names[0])
    else:
        files.problems.append(_nothing(folder, names))
    return files


def _numbered(names: list[str]) -> list[re.Match[str]]:
    """Files of one numbered set: those of transformers, else Mistral's own."""
    found = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    return [match for match in found if match[1] == "model"] or found


def config_file(folder: Path) -> Path:
    """`config.json`, or Mistral's `params.json` where that stands alone."""
    return folder / ("config.json" if os.path.lexists(folder / "config.json") else PARAMS)


def _add_indexed(files: Files, folder: Path, index: str) -> None:
    try:
        weight_map = read_object(folder / index).get("weight_map")
    except CheckpointError as error:
        files.problems.append(str(error))
        return
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        files.problems.append(f"{index}: expected weight_map to map names of tensors to names of files")
        return
    absent: list[str] = []
    by_file: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        by_file.setdefault(name, set()).add(tensor)
    for name, wanted in sorted(by_file.items()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            files.problems.append(f"{index} names the file {name!r}: expected a safetensors file beside it")
        elif not (folder / name).exists():
            absent.append(name)
        elif file := files.add(folder / name):
            if unfound := wanted - file.tensors.keys():
                files.problems.append(f"{index} says that {name} holds {some(unfound)}: it does not")
            if unnamed := file.tensors.keys() - wanted:
                files.problems.append(f"{name} holds {some(unnamed)}, which {index} does not place there")
    if absent:
        files.problems.append(f"{index} names {len(absent)} file(s) that are not there: {some(absent)}")


def _nothing(folder: Path, names: list[str]) -> str:
    if names:
        return f"found {some(names)}: expected {SINGLE}, files that {INDEX} names, or numbered ones"
    if pickles := sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)}):
        return (
            f"found {some(pickles)}: pickles can run any code and are not read. Take the model's safetensors files, or "
            "convert it in an environment that you trust: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)"
        )
    return f"expected {SINGLE}, or files that {INDEX} names, found none"


def some(names: set[str] | list[str]) -> str:
    """The first few of names, and how many more."""
    first = sorted(names)[:4]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
