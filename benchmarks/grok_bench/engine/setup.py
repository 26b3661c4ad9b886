"""The model and the engine that are measured: found, checked and loaded before the clock starts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grok_engine import ConfigError, EngineConfig, LLMEngine, ModelConfig
from grok_engine.loading.resolve import read_config, resolve_model
from grok_engine.models.families import PRESETS
from grok_engine.progress import byte_bar

from .workload import Job


def find_model(
    name: str, *, dummy: bool, overrides: Sequence[str] = (), **options: Any
) -> tuple[EngineConfig, Path | None, dict[str, Any]]:
    """`tiny`, a folder, or with `dummy` also a preset, changed by the NAME=VALUE of `overrides`.

    The configuration, the folder of the weights (None: random ones), and the engine's options. ConfigError for options
    that do not fit together.
    """
    if overrides and not dummy:
        raise ConfigError(f"--set {overrides[0]} needs --dummy: the model {name!r} has the shape that it has")
    if name in PRESETS and not dummy and not Path(name).is_dir():
        raise ConfigError(f"model {name!r} has no weights here: give --dummy for random ones, or a folder")
    folder = None if name in PRESETS and dummy else _folder(name)
    model = PRESETS[name] if folder is None else read_config(folder)
    changes = dict(map(_override, overrides))
    if "head_dim" in changes:
        changes.setdefault("attn_scale", 0)
    model = ModelConfig.from_dict({**model.to_dict(), **changes})
    options = {key: value for key, value in options.items() if value is not None}
    return EngineConfig(model=model, **options), None if dummy else folder, options


def load(
    config: EngineConfig, folder: Path | None, options: dict[str, Any], jobs: Sequence[Job]
) -> tuple[LLMEngine, float]:
    """An engine that can take each of `jobs`, and the seconds of loading.

    ValueError, before anything is loaded, where a job does not fit; the engine refuses what memory does not hold.
    """
    longest = max(len(job.prompt) + job.output_len for job in jobs)
    if longest > config.max_len:
        raise ValueError(f"a prompt and its answer have {longest} tokens, more than max_model_len={config.max_len}")
    began = time.perf_counter()
    with byte_bar("loading") as progress:
        engine = LLMEngine(config.model if folder is None else folder, progress=progress, **options)
    seconds = time.perf_counter() - began
    need, pages = engine.allocator.pages_for(longest - 1), engine.runner.num_pages
    if need > pages:
        raise ConfigError(
            f"a request needs {need} pages of keys and values, there are {pages}: expected a larger --num-pages or "
            "--kv-memory"
        )
    return engine, seconds


def _folder(name: str) -> Path:
    try:
        return resolve_model(name)
    except ConfigError:
        raise ConfigError(f"model {name!r} is neither a folder nor one of tiny, {', '.join(PRESETS)}") from None


def _override(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"--set {text!r}: expected NAME=VALUE, as in d_model=512")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
