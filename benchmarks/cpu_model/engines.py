"""The two sides: ours, in this process, and llama.cpp, a process a turn. Both give tokens a second."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from grok_engine import LLMEngine, SamplingParams
from grok_engine.config import ActFormat

TOOLS = ("llama-batched-bench", "llama-quantize")
PYTHON = (sys.executable, "-m", "benchmarks.cpu_model.llama_python")
FIRST_TOKEN = """
import gc
gc.disable()
import sys, time, torch
from grok_engine import LLMEngine, SamplingParams
gc.freeze()
gc.enable()
torch.set_num_threads(int(sys.argv[2]))
start = time.perf_counter()
engine = LLMEngine(sys.argv[1], max_num_seqs=1, num_pages=64, mmap=True)
engine.add_request("a", [5], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
assert engine.step()[0].outputs[0].token_ids
print(time.perf_counter() - start, flush=True)
"""


@dataclass(frozen=True)
class Load:
    """So many requests at once: prompts of `prompt` random tokens, then `new` tokens each."""

    requests: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Speed:
    """Tokens a second of all requests together."""

    prompt: float
    decode: float


class Ours:
    """The engine on a converted folder, its int8 weights those of the release's format. activations: as `EngineConfig`."""

    def __init__(self, folder: Path, loads: Sequence[Load], activations: ActFormat = "none") -> None:
        self.name = "grok-engine, int8" + (f", {activations} rows" if activations != "none" else "")
        self.folder = folder
        self._engine = LLMEngine(
            folder,
            activations=activations,
            max_num_seqs=max(load.requests for load in loads),
            max_num_batched_tokens=max(load.requests * load.prompt for load in loads),
            num_pages=max(load.requests * ((load.prompt + load.new) // 16 + 2) for load in loads),
            enable_prefix_caching=False,
        )
        self._serial = 0

    def speed(self, load: Load) -> Speed:
        vocabulary = self._engine.config.model.vocab_size
        params = SamplingParams(max_tokens=load.new + 1, temperature=0, ignore_eos=True)
        self._serial += 1
        rng = random.Random(self._serial)
        for i in range(load.requests):
            self._engine.add_request(f"{self._serial}.{i}", rng.choices(range(vocabulary), k=load.prompt), params)
        before = self._engine.stats().generated_tokens
        start = time.perf_counter()
        while self._engine.stats().generated_tokens < before + load.requests:
            self._engine.step()
        first = time.perf_counter()
        steps = 0
        while self._engine.has_unfinished_requests():
            self._engine.step()
            steps += 1
        end = time.perf_counter()
        if steps != load.new:
            raise RuntimeError(f"{steps} steps decoded, expected {load.new}: the requests did not run together")
        return Speed(load.requests * load.prompt / (first - start), load.requests * load.new / (end - first))

    def first_token(self) -> tuple[float, float]:
        """Seconds to the first token of a prompt of one, the folder mapped: from the start of a process, and from there
        on where it has imported torch and the engine, as a server that embeds it has."""
        command = [sys.executable, "-c", FIRST_TOKEN, str(self.folder), str(torch.get_num_threads())]
        seconds, line = _until(command, "")
        return seconds, float(line)


@dataclass(frozen=True)
class Tools:
    """llama.cpp's own programs in a folder, or, without one, its library through llama-cpp-python."""

    folder: Path | None

    def bench(self, file: Path, load: Load) -> list[str]:
        """The command that prints the speeds of a load as JSON."""
        threads = str(torch.get_num_threads())
        if self.folder is None:
            return [*PYTHON, "bench", str(file), threads, str(load.requests), str(load.prompt), str(load.new)]
        size = max(512, load.requests * (load.prompt + load.new))  # its warming up alone wants some
        sizes = {"-c": size, "-npp": load.prompt, "-ntg": load.new, "-npl": load.requests}
        options = [text for pair in sizes.items() for text in map(str, pair)]
        program = str(self.folder / TOOLS[0])
        return [program, "-m", str(file), "-t", threads, "-tb", threads, *options, "--output-format", "jsonl"]

    def quantize(self, source: Path, target: Path, kind: str) -> None:
        start = [*PYTHON, "quantize"] if self.folder is None else [str(self.folder / TOOLS[1])]
        _output([*start, str(source), str(target), kind])


class Llama:
    """llama.cpp on one GGUF file."""

    def __init__(self, tools: Tools, file: Path, name: str) -> None:
        self.name = f"llama.cpp, {name}"
        self._tools, self._file = tools, file

    def speed(self, load: Load) -> Speed:
        command = self._tools.bench(self._file, load)
        text = _output(command)
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        if len(rows) != 1:
            raise RuntimeError(f"{command[0]} printed {len(rows)} results, expected 1: {text[-500:]!r}")
        return Speed(rows[0]["speed_pp"], rows[0]["speed_tg"])

    def first_token(self) -> tuple[float, float]:
        """As of ours, with nothing to import but where the bindings run it; it warms up with 16 tokens, too."""
        seconds, _ = _until(self._tools.bench(self._file, Load(1, 1, 1)), "{")
        return seconds, seconds


def find_llama(folder: Path | None) -> Tools | None:
    """llama.cpp's tools: as given, or those on the path, or the llama-cpp-python package."""
    if folder is not None:
        lacking = [tool for tool in TOOLS if not (folder / tool).is_file()]
        if lacking:
            raise ValueError(f"--llama {folder}: expected llama.cpp's tools there, found no {', '.join(lacking)}")
        return Tools(folder)
    found = [shutil.which(tool) for tool in TOOLS]
    if found[0] and all(found):
        return Tools(Path(found[0]).parent)
    return Tools(None) if importlib.util.find_spec("llama_cpp") else None


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    return done.stdout


def _until(command: list[str], beginning: str) -> tuple[float, str]:
    """Seconds from a process's start to its first line that begins so, and the line. Giving memory back is left out."""
    # A process that may not write bytecode compiles a checkout's modules anew: an installed package has them compiled.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith(beginning)), None)
        seconds = time.perf_counter() - start
        process.stdout.read()
        if process.wait() or line is None:
            errors.seek(0)
            raise RuntimeError(f"{command[0]} ended with {process.returncode}: {errors.read()[-1500:]}")
    return seconds, line
