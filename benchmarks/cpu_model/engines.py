"""Our engine under a load, and the time from the start of a process to its first token, of both engines."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from grok_bench.kernels.entrant import Dropped
from grok_engine import LLMEngine, SamplingParams
from grok_engine.config import ActFormat

from .llama import Load

OURS = """
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
LLAMA = """
import sys, time, torch
from pathlib import Path
from benchmarks.cpu_model.llama import Llama, Load, _api
torch.set_num_threads(int(sys.argv[2]))
_api()
start = time.perf_counter()
Llama(Path(sys.argv[1]), Load(1, 1, 0)).time(0)
print(time.perf_counter() - start, flush=True)
"""


class Ours:
    """The engine on a converted folder, int8 weights as the release has them, under one load."""

    def __init__(self, folder: Path, activations: ActFormat, load: Load) -> None:
        self.load, self._turn = load, 0
        self._engine = LLMEngine(
            folder,
            activations=activations,
            max_num_seqs=load.requests,
            max_num_batched_tokens=load.requests * load.prompt,
            num_pages=load.requests * ((load.prompt + load.new) // 16 + 2),
            enable_prefix_caching=False,
        )

    def check(self, again: bool = False) -> None:
        """Warm up. `time` checks that every request got its tokens, which is all that random weights allow."""
        if not again:
            self.time(0)

    def time(self, turn: int) -> float:
        """Seconds of all prompts, or of one step of one token for each request."""
        engine, load = self._engine, self.load
        rng, self._turn = random.Random(turn), self._turn + 1
        params = SamplingParams(max_tokens=load.new + 1, temperature=0, ignore_eos=True)
        for i in range(load.requests):
            tokens = rng.choices(range(engine.config.model.vocab_size), k=load.prompt)
            engine.add_request(f"{self._turn}.{i}", tokens, params)
        before = engine.stats().generated_tokens
        start = time.perf_counter()
        while engine.stats().generated_tokens < before + load.requests:
            engine.step()
        first = time.perf_counter()
        steps = 0
        while engine.has_unfinished_requests():
            engine.step()
            steps += 1
        end = time.perf_counter()
        if steps != load.new:
            raise Dropped("failed", f"{steps} steps decoded, expected {load.new}: the requests did not run together")
        return (end - first) / steps if steps else first - start

    def close(self) -> None:
        self._engine.close()


@dataclass(frozen=True)
class FirstToken:
    """Seconds to the first token of a prompt of one token, in a new process: after its imports, or with them."""

    program: str
    path: Path
    imports: bool = False

    def check(self, again: bool = False) -> None:
        if not again:
            self.time(0)

    def time(self, turn: int) -> float:
        command = (sys.executable, "-c", self.program, str(self.path), str(torch.get_num_threads()))
        seconds, line = _until_first_line(command)
        return seconds if self.imports else float(line)

    def close(self) -> None:
        """Nothing outlives a turn."""


def _until_first_line(command: Sequence[str]) -> tuple[float, str]:
    """Seconds from the start of a process to its first line, and the line. The end of the process is not counted."""
    # A process that may not write bytecode would compile a checkout's modules each time: an installed package has them.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.stdout.read()
        if process.wait() or not line:
            errors.seek(0)
            raise Dropped("failed", f"a process ended with {process.returncode}: {errors.read()[-1500:]}")
    return seconds, line
