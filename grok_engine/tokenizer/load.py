"""Which tokenizer a checkpoint has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from grok_engine.checkpoint.generation import generation_files
from grok_engine.checkpoint.gguf.files import gguf_file, read_headers
from grok_engine.checkpoint.strict_json import read_object

from .base import Tokenizer, read_file
from .chat_files import chat_files
from .gguf import read_tokenizer
from .gguf import tokenizer_files as gguf_tokenizer_files
from .hf import CONFIG, HFTokenizer, read_config
from .ranks import tekken_files, tok_json_files
from .sentencepiece import SentencePieceTokenizer

HF, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_RANKED = {"tokenizer.tok.json": tok_json_files, "tekken.json": tekken_files}
# Families of the hub whose models were trained with BOS in front; a lone tokenizer.model does not say so.
_BEGIN_WITH_BOS = ("llama", "mistral", "mixtral")


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder or GGUF file, or None where it has none. ValueError for one that cannot be
    read.

    A folder with both kinds has the one of its `tokenizer.json`, which knows the tokens that were added later.
    """
    if (gguf := gguf_file(path)) is not None:
        return read_tokenizer(read_headers(gguf)[0].metadata, gguf)
    path = Path(path)
    if _is_there(path / HF):
        return HFTokenizer(path / HF)
    if (file := sentencepiece_file(path)) is not None:
        add_bos, add_eos = _adds(path)
        legacy = read_config(file).get("legacy") is True  # transformers' word for it
        return SentencePieceTokenizer(file, add_bos=add_bos, add_eos=add_eos, spaces_parts=legacy)
    for name, read in _RANKED.items():
        if _is_there(path / name):
            files = read(path / name)
            return HFTokenizer(path / name, files[HF], files[CONFIG])
    return None


def tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """What a folder needs to have the same tokenizer, chat templates and sampling defaults, by name: the files of a
    checkpoint's folder, or those that a GGUF file's metadata becomes. Raises as `load_tokenizer` and `load_chat` do."""
    if (gguf := gguf_file(path)) is not None:
        files = gguf_tokenizer_files(read_headers(gguf)[0].metadata, gguf)
    else:
        files = _folder_files(Path(path))
    chat = chat_files(Path(path), load_tokenizer(path), files.get(CONFIG, b"{}"))
    return generation_files(path) | files | chat


def _folder_files(path: Path) -> dict[str, bytes]:
    files = {name: read_file(path / name) for name in (HF, CONFIG) if _is_there(path / name)}
    if (file := sentencepiece_file(path)) is not None:
        files[SENTENCEPIECE] = read_file(file)
    if not files.keys() & {HF, SENTENCEPIECE}:
        files |= next((read(path / name) for name, read in _RANKED.items() if _is_there(path / name)), {})
    if SENTENCEPIECE in files and any(adds := tuple(_adds(path))):  # the folder may not say which family it is of
        values = read_config(path / SENTENCEPIECE) | dict(zip(("add_bos_token", "add_eos_token"), adds, strict=True))
        files[CONFIG] = json.dumps(values, indent=1).encode()
    return files


def sentencepiece_file(path: Path) -> Path | None:
    """The `tokenizer.model` of a folder; in Mistral's own, the last of its versions, as in `tokenizer.model.v3`."""
    if _is_there(path / SENTENCEPIECE):
        return path / SENTENCEPIECE
    return max(path.glob(f"{SENTENCEPIECE}.v[0-9]*"), default=None)


def _is_there(file: Path) -> bool:
    """Whether there is anything of this name: a folder, a pipe or a dangling link is an error, not no tokenizer."""
    return file.is_symlink() or file.exists()


def _adds(folder: Path) -> Iterator[bool]:
    """Whether BOS goes before and EOS after a prompt, where a `tokenizer.model` is all that a folder has."""
    values, config = read_config(folder / SENTENCEPIECE), folder / "config.json"
    begins = read_object(config).get("model_type") in _BEGIN_WITH_BOS if config.is_file() else False
    for key, default in (("add_bos_token", begins or (folder / "params.json").is_file()), ("add_eos_token", False)):
        found = values.get(key)
        if found not in (None, True, False):
            raise ValueError(f"{folder / CONFIG}: {key}={found!r:.80} is not true or false")
        yield default if found is None else found
