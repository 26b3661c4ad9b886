"""python -m benchmarks.load_times [--dir DIR] [--rounds N] [--smoke]

How long a model of 1.30 B parameters takes to load and to its first token, and how much anonymous memory, which no file
backs, that takes: from every format, cold (evicted from the page cache) and warm, beside llama.cpp where
llama-cpp-python is installed. A Q4_K_S.gguf that llama.cpp's `llama-quantize` put into DIR is loaded, too. Each load is
a process of its own; the contestants take turns. Imports are not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console

from benchmarks.cpu_model.models import small_configuration, write_models
from benchmarks.model_1b import configuration
from grok_bench.report.table import grid
from grok_engine.loading.convert import convert

# Programs of a path and options: a line once all is imported, one when the model is loaded, one after its first token.
OURS = """
import json, sys, time, torch
from grok_engine import LLMEngine, SamplingParams
path, options = sys.argv[1], json.loads(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
engine = LLMEngine(path, max_num_seqs=1, num_pages=64, **options)
print(time.perf_counter() - start, flush=True)
engine.add_request("a", [5], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
assert engine.step()[0].outputs[0].token_ids
print(time.perf_counter() - start, flush=True)
"""
LLAMA = """
import sys, time
from llama_cpp import Llama
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
model = Llama(sys.argv[1], n_ctx=512, verbose=False)
print(time.perf_counter() - start, flush=True)
model.eval([5])
print(time.perf_counter() - start, flush=True)
"""


class Contestant(NamedTuple):
    name: str
    program: str
    path: Path
    options: dict[str, object]


class Sample(NamedTuple):
    """Seconds to the return of the load and to the first token; bytes of anonymous memory at the peak of the load,
    beyond those before it."""

    load: float
    token: float
    peak: int


def contestants(folder: Path) -> Iterator[Contestant]:
    for name, path, options in (
        ("safetensors bf16", "hf", {}),
        ("safetensors bf16, int8", "hf", {"weights": "int8"}),
        ("GGUF Q8_0", "Q8_0.gguf", {}),
        ("GGUF Q4_K_S", "Q4_K_S.gguf", {}),
        ("GGUF Q4_K_S, int8", "Q4_K_S.gguf", {"weights": "int8"}),
        ("release int8", "xai", {}),
        ("packed int8", "packed", {}),
        ("packed int8, mapped", "packed", {"mmap": True}),
    ):
        if (folder / path).exists():
            yield Contestant(name, OURS, folder / path, options)
    for path in sorted(folder.glob("*.gguf")) if importlib.util.find_spec("llama_cpp") else ():
        yield Contestant(f"llama.cpp, {path.stem}", LLAMA, path, {})


def evict(path: Path) -> None:
    """Drop the files from the page cache. Other processes' mappings of them keep their pages."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def anonymous(pid: int) -> int:
    """Bytes of a process's memory that no file backs, now."""
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kb) << 10 for kb in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", text))


def measure(contestant: Contestant) -> Sample:
    """Load in a new process, watched every 2 ms."""
    command = [sys.executable, "-c", contestant.program, str(contestant.path), json.dumps(contestant.options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.002)[0]:
            peak = max(peak, anonymous(process.pid))  # of the load alone: the first token has memory of its own
        text = process.stdout.read()
    if text.count("\n") != 2:
        raise RuntimeError(f"{contestant.name}: the process ended with {process.returncode}")
    load, token = map(float, text.split())
    return Sample(load, token, peak - before)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_times", description="How fast a model loads.")
    parser.add_argument("--dir", type=Path, help="write the models there and keep them; a temporary folder without")
    parser.add_argument("--rounds", type=int, default=3, help="of all contestants, cold and then warm")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round: whether it runs, not how fast")
    a = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_models(folder, small_configuration() if a.smoke else configuration(), ["Q8_0"])
        if not (folder / "hf").is_dir():
            convert(folder / "xai", folder / "hf", format="hf", weights="bf16")
        found = list(contestants(folder))
        samples: dict[tuple[str, bool], list[Sample]] = {}
        for number in range(1 if a.smoke else a.rounds):
            for cold in (True, False):
                for contestant in found[number % len(found) :] + found[: number % len(found)]:
                    if cold:
                        evict(contestant.path)
                    samples.setdefault((contestant.name, cold), []).append(measure(contestant))
    rows = []
    for name in (contestant.name for contestant in found):
        cold, warm = (list(zip(*samples[name, cold], strict=True)) for cold in (True, False))
        times = [f"{median(taken):.2f} s" for taken in (*cold[:2], *warm[:2])]
        rows.append([name, *times, f"{max(*cold[2], *warm[2]) / 1e6:,.0f} MB"])
    grid(("medians", "load, cold", "to a token", "load, warm", "to a token", "peak"), rows, Console())


if __name__ == "__main__":
    main()
