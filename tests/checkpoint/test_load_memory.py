"""While a model is loaded, anonymous memory holds its weights, one tensor, and 30 MB: from every kind of file."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from safetensors.torch import load_file, save_file

from benchmarks.load_times import anonymous
from benchmarks.model_1b import random_tensors
from grok_engine.checkpoint.xai.writer import write_xai
from grok_engine.loading.convert import convert
from grok_engine.models.families import preset
from tests.checkpoint import gguf_models

ROOT = Path(__file__).parents[2]
SLACK = 30 << 20
# 8 experts of 3 × 1024 × 2048: 50 M parameters, 100 MB in bf16
MODEL = replace(
    preset("grok-1"), name="wide", vocab_size=4096, d_model=1024, num_layers=1, num_heads=8, num_kv_heads=1, d_ff=2048,
    max_position=64,
)  # fmt: skip
# What is loaded, with which `weights` or from a mapped file
LOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("bf16", {}),
    "bf16 as int8": ("bf16", {"weights": "int8"}),
    "fp16": ("fp16", {}),
    "fp16 as bf16": ("fp16", {"weights": "bf16"}),
    "Q8_0": ("Q8_0.gguf", {}),
    "Q8_0 as bf16": ("Q8_0.gguf", {"weights": "bf16"}),
    "Q4_K": ("Q4_K.gguf", {}),
    "Q4_K as int8": ("Q4_K.gguf", {"weights": "int8"}),
    "release": ("release", {}),
    "release as fp8": ("release", {"weights": "fp8"}),
    "packed": ("packed", {}),
    "packed, mapped": ("packed", {"mmap": True}),
}
PROGRAM = """
import gc, json, sys
from grok_engine import LLMEngine
LLMEngine(sys.argv[1], num_pages=4, max_num_seqs=1).close()  # what loads once, such as threads
for path, options in json.loads(sys.argv[2]):
    print("ready", flush=True)
    sys.stdin.readline()
    engine = LLMEngine(path, num_pages=4, max_num_seqs=1, **options)
    print(sum(p.numel() * p.element_size() for p in engine.model.parameters()), flush=True)
    engine.close()
    del engine
    gc.collect()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_xai(root / "release", MODEL, random_tensors(MODEL))
    convert(root / "release", root / "packed")
    convert(root / "release", root / "bf16", format="hf", weights="bf16")
    shutil.copytree(root / "bf16", root / "fp16")
    for file in (root / "fp16").glob("*.safetensors"):
        save_file({name: x.half() for name, x in load_file(file).items()}, file)
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_K):
        gguf_models.write_model(root / f"{kind.name}.gguf", kind, experts=40, layers=2)  # 31 M parameters
    return root


def largest(path: Path) -> int:
    """Bytes of the largest tensor in bf16: that of all experts."""
    experts = 40 * gguf_models.F * gguf_models.D if path.suffix == ".gguf" else 8 * MODEL.d_ff * MODEL.d_model
    return 2 * experts


@pytest.mark.skipif("GROK_TEST_MORE" not in os.environ, reason="half a minute: make more")
def test_the_peak_of_every_load(folder: Path) -> None:
    loads = [(str(folder / path), options) for path, options in LOADS.values()]
    command = [sys.executable, "-c", PROGRAM, str(folder / "release"), json.dumps(loads)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    wrong = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for name, (path, options) in zip(LOADS, loads, strict=True):
            assert process.stdout.readline() == "ready\n"
            before = peak = anonymous(process.pid)
            process.stdin.write("\n")
            process.stdin.flush()
            while not select.select([process.stdout], [], [], 0.001)[0]:
                peak = max(peak, anonymous(process.pid))
            weights = int(process.stdout.readline()) * ("mmap" not in options)
            bound = weights + largest(Path(path)) + SLACK
            if peak - before > bound:
                wrong[name] = f"{(peak - before) / 1e6:.0f} MB, of which the weights are {weights / 1e6:.0f}"
    assert not wrong
