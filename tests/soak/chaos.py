"""Failures on purpose: of forward passes and allocations, in processors, by Ctrl-C; and calls that must be refused."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from torch import Tensor

import grok_engine
import grok_kernels
from grok_engine import LLM, EngineBusyError, LLMEngine
from grok_engine.models.decoder import Decoder, DecoderLayer
from grok_engine.runtime.runner import Runner

from .oracle import INJECTED

PACKAGE = str(Path(grok_engine.__file__).parent)
ERRORS: list[type[Exception]] = [RuntimeError, MemoryError, ValueError]
OTHERS: list[type[BaseException]] = [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]
SITES: list[tuple[Any, str]] = [  # what a step calls: each fails before or after its work
    (Runner, "forward"), (Runner, "logits"), (Decoder, "forward"), (DecoderLayer, "forward"),
    (grok_kernels, "sample_top_p"),
]  # fmt: skip


def is_injected(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is one of ours."""
    while error is not None:
        if INJECTED in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def refused(call: Callable[[], Any], kinds: type[BaseException] | tuple[type[BaseException], ...]) -> str | None:
    """None if `call` raises one of `kinds` with a sentence, else what it did instead."""
    try:
        result = call()
    except kinds as error:
        return None if " " in str(error) else f"raised {error!r} without a sentence"
    except BaseException as error:
        return None if is_injected(error) else f"raised {error!r}"
    return f"returned {result!r}"


@contextmanager
def failing(rng: random.Random, rate: float, counts: Counter[str]) -> Iterator[None]:
    """A share `rate` of a step's calls raises: an Exception, or rarely another BaseException."""

    def wrapped(plain: Callable[..., Any], site: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            roll = rng.random()
            fails, before = roll < rate, roll < rate / 2
            if fails and before:
                _fail(rng, site, counts)
            result = plain(*args, **kwargs)
            if fails:
                _fail(rng, f"after {site}", counts)
            return result

        return call

    with ExitStack() as stack:
        for owner, name in SITES if rate else ():
            stack.enter_context(mock.patch.object(owner, name, wrapped(getattr(owner, name), name)))
        yield


def _fail(rng: random.Random, site: str, counts: Counter[str]) -> None:
    kind = rng.choice(OTHERS if rng.random() < 0.2 else ERRORS)
    counts["failures of steps"] += 1
    raise kind(f"{INJECTED} {site}")


@contextmanager
def interrupts(rng: random.Random, every: float, counts: Counter[str]) -> Iterator[None]:
    """Ctrl-C at the main thread about `every` seconds; it takes effect wherever it meets the engine's code."""
    main, stop = threading.main_thread(), threading.Event()
    assert threading.current_thread() is main

    def handler(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                counts["Ctrl-C"] += 1
                raise KeyboardInterrupt(f"{INJECTED} Ctrl-C")
            frame = frame.f_back

    def press() -> None:
        while not stop.wait(rng.uniform(0.3, 1.7) * every):
            signal.pthread_kill(main.ident or 0, signal.SIGINT)

    before = signal.signal(signal.SIGINT, handler)
    thread = threading.Thread(target=press, name="soak-ctrl-c")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def raiser(rng: random.Random, kinds: list[Any], counts: Counter[str]) -> Callable[[list[int], Tensor], Tensor]:
    """A processor that raises one of `kinds` at one of the first tokens."""
    at, kind = rng.choice([0, 1, 4]), rng.choice(kinds)

    def process(token_ids: list[int], logits_V: Tensor) -> Tensor:
        if len(token_ids) == at:
            counts["failures of processors"] += 1
            raise kind(f"{INJECTED} in a processor")
        return logits_V

    return process


def meddler(llm: LLM, wrong: list[str], counts: Counter[str]) -> Callable[[list[int], Tensor], Tensor]:
    """A processor from which calls during a step must be refused: its own and those of another thread."""
    engine = llm.engine
    calls: dict[str, Callable[[], Any]] = {
        "step": engine.step, "logits": lambda: engine.logits([5, 6]), "close": engine.close, "sleep": engine.sleep,
        "generate": lambda: llm.generate([5, 6]),
    }  # fmt: skip

    def process(token_ids: list[int], logits_V: Tensor) -> Tensor:
        if len(token_ids) == 1:
            meddle("re-entered", list(calls))
            # from elsewhere `generate` would wait for the step
            thread = threading.Thread(target=meddle, args=("from another thread", list(calls)[:-1]))
            thread.start()
            thread.join()
        return logits_V

    def meddle(how: str, names: list[str]) -> None:
        for name in names:
            counts["refused: busy"] += 1
            if what := refused(calls[name], EngineBusyError):
                wrong.append(f"{name} {how} {what}")

    return process


def fork(engine: LLMEngine, counts: Counter[str], limit: float = 20.0) -> str | None:
    """A child forked after use: its step is refused. None, or what happened instead."""
    counts["refused: forked"] += 1
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        what = refused(engine.step, RuntimeError)
        os._exit(3 if what else 0)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if status == 0 else f"a step in a forked child was not refused (status {status})"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "a step in a forked child hangs"
