"""Compiling a grammar where it can do no harm: first in a child process, under limits of time and memory, and then
here, on a thread with a stack larger than the child's. What passes there passes here: it is the same code."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from . import grammar_worker

T = TypeVar("T")
_PROCESSES = 4  # at once; each ends a grammar within its seconds
_START_SECONDS = 60.0
_stack_lock = threading.Lock()


class GrammarChecker:
    """Compiles grammars in child processes. Safe to use from any thread; a caller waits for its own grammar alone."""

    def __init__(self, library: ModuleType, vocab_size: int, eos: tuple[int, ...], seconds: float) -> None:
        assert library.__file__ is not None
        self._arguments = [str(Path(library.__file__).parent.parent), json.dumps([vocab_size, eos])]
        self._seconds = seconds
        self._slots = threading.BoundedSemaphore(_PROCESSES)
        self._idle: list[_Child] = []

    def __call__(self, kind: str, text: str) -> tuple[str, list[str]]:
        """The grammar in the library's own format, and warnings. ValueError with the reason, the limit among them."""
        if not self._slots.acquire(timeout=self._seconds):
            raise ValueError(f"{_PROCESSES} other grammars were compiled all through grammar_seconds={self._seconds:g}")
        try:
            try:
                child = self._idle.pop()
            except IndexError:
                child = _Child(self._arguments)
            if not child.alive:  # ended by somebody else while it waited
                child = _Child(self._arguments)
            answer = child.ask({"kind": kind, "text": text, "seconds": self._seconds}, self._seconds)
            self._idle.append(child)
        finally:
            self._slots.release()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["grammar"], answer["warnings"]


class _Child:
    """One process of `grammar_worker`. RuntimeError if it cannot be started."""

    def __init__(self, arguments: list[str]) -> None:
        python = os.fsdecode(spawn.get_executable() or "python")  # `multiprocessing.set_executable` where embedded
        command = [python, "-I", "-S", grammar_worker.__file__, *arguments]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                start_new_session=True,  # Ctrl-C in a terminal is not meant for it
            )  # fmt: skip
        except OSError as error:
            raise RuntimeError(f"structured output cannot start {python}, which compiles grammars: {error}") from None
        self._process, self._stop = process, weakref.finalize(self, _end, process, os.getpid())
        try:
            self._read(_START_SECONDS)
        except (EOFError, TimeoutError):
            self._stop()
            raise RuntimeError(
                f"structured output: {' '.join(command[:4])} does not start; where {python} is not Python, name one by "
                "multiprocessing.set_executable"
            ) from None

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The child's answer. ValueError, and the end of the child, if it dies or takes longer."""
        try:
            stdin = self._process.stdin
            assert stdin is not None
            line = memoryview(json.dumps(job).encode() + b"\n")
            while line:
                line = line[stdin.write(line) :]
            answer: dict[str, Any] = json.loads(self._read(seconds))
            return answer
        except TimeoutError:
            self._stop()
            raise ValueError(f"compiling it takes longer than grammar_seconds={seconds:g}") from None
        except (EOFError, OSError):
            self._stop()
            code = self._process.returncode
            died = "took more memory than allowed" if code == -signal.SIGABRT else "died of it"
            raise ValueError(f"the grammar library {died} (exit status {code})") from None
        except BaseException:  # a half-read answer must not be taken for the next one's
            self._stop()
            raise

    def _read(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline, found = self._process.stdout.fileno(), time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError
                part = os.read(descriptor, 1 << 16)
                if not part:
                    raise EOFError
                found += part
        return found


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that started it
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def on_large_stack(function: Callable[[], T]) -> T:
    """`function()` on a thread with twice the stack that the child had."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="grammar")
    with _stack_lock:  # the size is one for all threads: another thread that starts meanwhile gets it, too
        before = threading.stack_size(2 * grammar_worker.STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
