"""python -m benchmarks.load_times [--dir DIR] [--rounds N] [--only NAME ...] [--json FILE] [--smoke]

How long a model of 1.30 B parameters takes to load and to its first token, and how much anonymous memory, which no file
backs, that takes: from every format, cold (evicted from the page cache) and warm, beside llama.cpp. Each load is a
process of its own; the contestants take turns. Imports are not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.cpu_model.__main__ import small_configuration, write_models
from benchmarks.model_1b import configuration
from grok_engine.loading.convert import convert

OURS = """
import json, sys, time, torch
from grok_engine import LLMEngine, SamplingParams
path, options = sys.argv[1], json.loads(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
start, cpu = time.perf_counter(), time.process_time()
engine = LLMEngine(path, max_num_seqs=1, num_pages=64, **options)
print(time.perf_counter() - start, time.process_time() - cpu, flush=True)
engine.add_request("a", [5], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
assert engine.step()[0].outputs[0].token_ids
print(time.perf_counter() - start, flush=True)
"""
LLAMA = """
import json, sys, time, torch
from pathlib import Path
from benchmarks.cpu_model.llama import Llama, Load, _api
_api()
print("ready", flush=True)
sys.stdin.readline()
start, cpu = time.perf_counter(), time.process_time()
model = Llama(Path(sys.argv[1]), Load(1, 1, 0))
print(time.perf_counter() - start, time.process_time() - cpu, flush=True)
model.time(0)
print(time.perf_counter() - start, flush=True)
"""


@dataclass(frozen=True)
class Contestant:
    name: str
    program: str
    path: Path
    options: dict[str, object]


@dataclass(frozen=True)
class Sample:
    """Seconds to the return of the load, of all cores until then, and to the first token; bytes of anonymous memory at
    the peak of the load, beyond those before it."""

    load: float
    cpu: float
    token: float
    peak: int


def contestants(folder: Path, kinds: Sequence[str]) -> Iterator[Contestant]:
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
    for kind in kinds:
        yield Contestant(f"llama.cpp, {kind}", LLAMA, folder / f"{kind}.gguf", {})


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
    return Sample(*map(float, text.split()), peak=peak - before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_times", description="How fast a model loads.")
    parser.add_argument("--dir", type=Path, help="write the models there and keep them; a temporary folder without")
    parser.add_argument("--rounds", type=int, default=3, help="of all contestants, cold and then warm")
    parser.add_argument("--only", nargs="*", help="contestants, by parts of their names")
    parser.add_argument("--json", type=Path, help="write every sample there")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round: whether it runs, not how fast")
    a = parser.parse_args(arguments)
    config = small_configuration() if a.smoke else configuration()
    kinds = ("Q8_0", "Q4_K_S") if all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))) else ()
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_models(folder, config, kinds)
        if not (folder / "hf").is_dir():
            convert(folder / "xai", folder / "hf", format="hf", weights="bf16")
        found = [c for c in contestants(folder, kinds) if a.only is None or any(part in c.name for part in a.only)]
        samples: dict[tuple[str, str], list[Sample]] = {}
        for number in range(1 if a.smoke else a.rounds):
            for cache in ("cold", "warm"):
                for contestant in found[number % len(found) :] + found[: number % len(found)]:
                    if cache == "cold":
                        evict(contestant.path)
                    samples.setdefault((contestant.name, cache), []).append(measure(contestant))
    print(f"{torch.get_num_threads()} threads, medians of {len(next(iter(samples.values())))} rounds")
    print(f"{'':26} cold: load   to a token   warm: load   to a token   of all cores   peak MB")
    for contestant in found:
        cold, warm = (samples[contestant.name, cache] for cache in ("cold", "warm"))
        keys = ("load", "token", "cpu")
        times = [statistics.median(getattr(s, key) for s in some) for some in (cold, warm) for key in keys]
        del times[2]
        peak = max(s.peak for s in [*cold, *warm])
        print(f"{contestant.name:26}" + "".join(f"{t:10.2f} s" for t in times) + f"{peak / 1e6:10,.0f}")
    if a.json:
        lines = [{"name": n, "cache": c, "samples": [asdict(s) for s in some]} for (n, c), some in samples.items()]
        a.json.write_text(json.dumps(lines, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
