"""How a request samples where its caller does not say: as the checkpoint's files have it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.checkpoint.generation import read_generation
from grok_engine.config import GenerationConfig, shown
from grok_engine.log import QuietLogger
from grok_engine.sampling.params import SamplingParams

log = QuietLogger("grok_engine")

# What counts, and what it is called here; the same keys as in vLLM.
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(path: Path | None, choice: GenerationConfig = "auto") -> SamplingParams:
    """The sampling defaults of a checkpoint; `do_sample` false is a temperature of 0. Those of `SamplingParams` where
    its files say nothing, or without a path, or by choice. CheckpointError names the file and every value that is
    wrong."""
    params, said, problems = SamplingParams(), {}, []
    if path is None or choice == "vllm":
        return params
    source, values = read_generation(path)
    for key, field in _FIELDS.items():
        if key in values:
            try:
                params, said[field] = replace(params, **{field: values[key]}), values[key]
            except ValueError as error:
                problems.append(f"{key}: {error}" if key != field else str(error))
    if (sampled := values.get("do_sample")) not in (None, True, False):
        problems.append(f"do_sample={shown(sampled)} is not true or false")
    if problems:
        raise CheckpointError("\n  ".join([f"{source} has wrong values:", *problems]), tuple(problems))
    if sampled is not None and not sampled:
        params, said["temperature"] = replace(params, temperature=0), 0
    if said:
        log.info("sampling defaults, from %s: %s", source, ", ".join(f"{name}={value}" for name, value in said.items()))
    return params
