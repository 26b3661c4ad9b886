"""Damaged files of every kind, rotary parameters of any value, large files: an error in a sentence, in time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from grok_engine import CheckpointError, read_config
from grok_engine.checkpoint.hf.files import INDEX
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.strict_json import MAX_BYTES
from tests.checkpoint.hf_models import config_of, configure

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "hf"
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**6, 2**62, -(2**62), 0.5, -0.5, 1e-300, 1e300, "", "x", "16", [], [1], [[1]],
    ["x"], {}, {"x": 1}, {"rope_type": "yarn", "factor": 1e300}, {"rope_type": ["yarn"]}, {"type": {}},
]  # fmt: skip
ROPE = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "attention_factor", "truncate", "original_max_position_embeddings", "rope_type",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_any_rotary_parameter(kind: str, tmp_path: Path) -> None:
    values = {key: value for key, value in config_of(DATA / "llama-a").items() if key != "rope_parameters"}
    rope = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for key in ROPE:
        for value in VALUES:
            configure(tmp_path, {**values, "rope_parameters": {**rope, key: value}, "head_dim": 16})
            try:
                config = read_config(tmp_path)
            except CheckpointError:
                continue
            assert all(0 < factor < 1e13 for factor in config.rope_factors)


def test_any_quantisation(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DATA / "llama-a", folder)
    values, config = config_of(folder), read_config(folder)
    group: dict[str, Any] = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    keys: dict[str, tuple[str, ...]] = {
        "fp8": ("quant_method", "fmt", "weight_block_size"),
        "compressed-tensors": ("config_groups", "sparsity_config", "transform_config", "format", "kv_cache_scheme"),
        "gptq": ("bits", "group_size", "sym", "checkpoint_format", "dynamic", "pack_dtype", "is_marlin_format"),
        "awq": ("bits", "w_bit", "group_size", "version", "zero_point", "backend"),
    }
    for method in keys:
        base = {"quant_method": method, "config_groups": {"g": group}}
        for key in keys[method]:
            for value in [*VALUES, {"g": 1}, {"g": {"weights": 1}}, {"g": {"weights": {"strategy": "block"}}}]:
                configure(folder, {**values, "quantization_config": {**base, key: value}})
                with contextlib.suppress(CheckpointError):
                    open_checkpoint(folder, config)
    for key in ("type", "num_bits", "strategy", "symmetric", "group_size", "block_structure", "format"):
        for value in VALUES:
            one = {**group, "weights": {**group["weights"], key: value}, "format": value if key == "format" else None}
            found = {"quant_method": "compressed-tensors", "config_groups": {"g": one}}
            configure(folder, {**values, "quantization_config": found})
            with contextlib.suppress(CheckpointError):
                open_checkpoint(folder, config)


def run(seed: int, count: int) -> None:
    """In a process of its own, which a mutant may kill or fill."""
    command = [sys.executable, "-m", "tests.checkpoint.mutants", "--seed", str(seed), "--count", str(count)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks")))}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    refused = int(re.findall(r"(\d+) refused", done.stdout)[-1])
    assert count / 2 < refused < count


def test_some_mutants() -> None:
    run(1, 200)


@pytest.mark.skipif("GROK_TEST_MORE" not in os.environ, reason="a minute: make more")
@pytest.mark.parametrize("seed", [2, 3])
def test_many_mutants(seed: int) -> None:
    run(seed, 2500)


def index_of(count: int) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": f"f{i}.safetensors" for i in range(count)}}).encode()


LARGE: dict[str, bytes] = {
    "lists": b"[" + b"[]," * (MAX_BYTES // 12) + b"1]",
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}",
    "index": index_of(20_000),
    "beyond": b" " * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_large_file_is_refused_in_time(kind: str, file: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DATA / "llama-a", folder)
    config = read_config(folder)
    (folder / file).write_bytes(LARGE[kind])
    begun = time.process_time()
    with pytest.raises(CheckpointError):
        open_checkpoint(folder, read_config(folder) if file == "config.json" else config)
    assert time.process_time() - begun < 5


def test_more_experts_or_layers_than_there_are_is_said_at_once(tmp_path: Path) -> None:
    for change in ({"num_local_experts": 4096}, {"num_hidden_layers": 4096}, {"num_local_experts": 40}):
        configure(tmp_path, {**config_of(DATA / "mixtral-a"), **change})
        save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"missing \d+ tensor|experts in all"):
            open_checkpoint(tmp_path, read_config(tmp_path))
