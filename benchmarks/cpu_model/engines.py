"""Engines in processes of their own under a load."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grok_bench.kernels.entrant import Dropped, Entrant, Remote
from grok_engine import LLMEngine, SamplingParams
from grok_engine.config import ActFormat


@dataclass(frozen=True)
class Load:
    """The load on an engine: requests at once, each with a prompt of `prompt` random tokens, then `new` tokens.

    Timed are the prompts where `new` is 0, else the mean decode step.
    """

    requests: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """Tokens in what is timed."""
        return self.requests if self.new else self.requests * self.prompt


class Apart(Remote):
    """`enter(*args)` in a process of its own. `peak`: the most bytes that it had resident, torch's code included."""

    peak = 0

    def __init__(self, enter: Callable[..., Entrant], *args: Any, limit: float) -> None:
        super().__init__(enter, args, limit)

    def close(self) -> None:
        with suppress(OSError):
            text = Path(f"/proc/{self._process.pid}/status").read_text()
            self.peak = int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) << 10
        super().close()


class Ours:
    """The engine on a checkpoint, whose weights stay as they are stored, under one load."""

    def __init__(self, path: Path, activations: ActFormat, load: Load) -> None:
        self.load, self._turn = load, 0
        self._engine = LLMEngine(
            path,
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
