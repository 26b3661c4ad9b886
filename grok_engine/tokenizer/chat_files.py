"""The chat templates that come with a model, and what they may know of its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grok_engine.checkpoint.gguf.files import gguf_file, read_headers
from grok_engine.checkpoint.strict_json import MAX_BYTES, read_object

from .base import Tokenizer
from .chat import ChatFormat
from .chat_builtin import BUILT_IN, built_in
from .hf import CONFIG as _CONFIG
from .hf import read_config

JINJA, MORE, JSON = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
_KEY = "chat_template"
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_GGUF_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def load_chat(path: Path | None, tokenizer: Tokenizer | None) -> ChatFormat:
    """How the model in a folder or a GGUF file writes turns: by the templates of its files, or by one that is built in
    for its kind. ValueError for files that cannot be read."""
    if path is None or tokenizer is None:
        return ChatFormat("the model" if path is None else path.name, tokenizer, {}, {})
    templates, special, architecture = _read(path)
    if not templates and (name := built_in(tokenizer.control.ids, architecture)):
        templates = {"default": BUILT_IN[name]}
    spelled = {token_id: token for token, token_id in tokenizer.control.ids.items()}
    ids = {"bos_token": tokenizer.bos_token_id, "eos_token": next(iter(tokenizer.eos_token_ids), None)}
    found = {key: spelled[token_id] for key, token_id in ids.items() if token_id in spelled}
    return ChatFormat(path.name, tokenizer, templates, found | special)


def has_template(path: Path) -> bool:
    """Whether a model's own files have a template."""
    return bool(_read(path)[0])


def chat_files(path: Path, tokenizer: Tokenizer | None, config: bytes) -> dict[str, bytes]:
    """The files, by name, that give a folder the same templates, where transformers reads them too: one for the
    default, else an entry of its tokenizer_config.json. config: the content of that file."""
    templates = dict(load_chat(path, tokenizer).templates)
    if not templates:
        return {}
    if [*templates] == ["default"] and "\r" not in templates["default"]:  # which text files are read without
        return {JINJA: templates["default"].encode()}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    return {_CONFIG: json.dumps({**json.loads(config), _KEY: named}, ensure_ascii=False, indent=1).encode()}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any], str]:
    """Templates, special tokens, and the architecture as its `config.json` names it."""
    if (gguf := gguf_file(path)) is not None:
        return _read_gguf(gguf)
    config = read_config(path / _CONFIG)
    templates = _named(_object(path / JSON).get(_KEY), path / JSON) | _named(config.get(_KEY), path / _CONFIG)
    if (file := path / JINJA).is_file():
        templates["default"] = _text(file)
    for file in sorted((path / MORE).glob("*.jinja")):
        templates[file.stem] = _text(file)
    values = _object(path / "special_tokens_map.json") | config
    special = {key: _token(values.get(key)) for key in (f"{name}_token" for name in _SPECIAL)}
    architectures = _object(path / "config.json").get("architectures")
    if not (path / "config.json").is_file() and (path / "params.json").is_file():
        architectures = ["MistralForCausalLM"]  # the files of Mistral's own library
    architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
    return templates, {key: token for key, token in special.items() if token is not None}, str(architecture)


def _read_gguf(path: Path) -> tuple[dict[str, str], dict[str, Any], str]:
    metadata: Mapping[str, Any] = read_headers(path)[0].metadata
    key = "tokenizer.chat_template"
    found = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    if key in metadata:
        found["default"] = metadata[key]
    for name, text in found.items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: the chat template {name!r:.80} is {text!r:.80}, expected text")
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    ids = {name: metadata.get(f"tokenizer.ggml.{their}_token_id") for name, their in _GGUF_NAMES.items()}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}
    return found, special, ""


def _object(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def _text(file: Path) -> str:
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, expected at most {MAX_BYTES:,}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from None


def _named(value: Any, file: Path) -> dict[str, str]:
    """Templates by name: one text is the default; several are a list of names and texts, or an object of them."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise ValueError(f"{file}: {_KEY} is {value!r:.80}: expected text, or a list of names and templates")
    return value


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
