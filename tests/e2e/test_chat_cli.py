"""`grok-engine chat` on a terminal of its own, and with its input from a pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grok_engine.cli import main

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "TERM": "dumb", "INPUTRC": "/dev/null"}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
CHAT = (sys.executable, "-m", "grok_engine.cli", "chat", "tiny", "--chat-template", TEMPLATE, "--temperature", "0")


class Terminal:
    """A program on a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], file: int) -> None:
        self.process, self._file, self.text = process, file, ""

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        """Wait until what was printed since the last call matches; returns it."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.text!r}"
            if select.select([self._file], [], [], left)[0]:
                try:
                    data = os.read(self._file, 4096)
                except OSError:  # the program has ended
                    data = b""
                assert data, f"the end, and no {pattern!r} in {self.text!r}"
                self.text = re.sub(r"\x1b\[[0-9;]*m", "", self.text + data.decode(errors="replace"))  # colours
        found, self.text = self.text, ""
        return found

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())


@contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    # a session of its own whose controlling terminal this is, so that Ctrl-C typed there is a signal
    setup = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", setup, *command], stdin=theirs, stdout=theirs, stderr=theirs, env=ENV,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)


def test_a_conversation_on_a_terminal() -> None:
    with terminal(*CHAT, "--max-tokens", "400") as screen:
        assert "/exit" in screen.read_until("> $")
        screen.type("My dear Watson,\n")
        screen.read_until(r"Watson,\s+(\S+ ){3}")  # the answer, behind the echo of the line
        screen.type("\x03")  # Ctrl-C stops the answer, not the program
        screen.read_until(r"\(stopped\)\s+> $")
        screen.type("half a li")
        screen.read_until("half a li")
        time.sleep(0.2)  # readline waits for the next key
        screen.type("\x03")  # and clears a line
        screen.read_until(r"/exit[^>]*> $")
        screen.type("/reset\n")
        screen.read_until("> $")
        screen.type("/what\n")
        assert "/what is not a command" in screen.read_until("> $")
        screen.type("\x04")  # Ctrl-D
        assert screen.process.wait(60) == 0


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[str], str]]:
    def run(lines: str, *options: str) -> tuple[list[str], str]:
        """The answers to lines of standard input, and what the program said itself."""
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        assert main([*CHAT[3:], *options]) == 0
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    return run


def test_lines_from_a_pipe_are_turns(chat: Callable[..., tuple[list[str], str]]) -> None:
    answers, said = chat("The king\n\n/system You are Holmes.\nThe king\n/exit\nnot read\n", "--max-tokens", "8")
    assert len(answers) == 2
    assert all(answers)
    assert said.count("cut off") == 2
    assert chat("The king", "--max-tokens", "8")[0] == answers[:1]


def test_a_full_context_forgets_whole_turns(chat: Callable[..., tuple[list[str], str]]) -> None:
    options = ("--max-tokens", "8", "--max-model-len", "64")
    answers, said = chat("The king and the queen of the land\n" * 6, *options)
    assert len(answers) == 6
    assert "the context is full: forgot the first 1 turn of the conversation" in said
    answers, said = chat(f"{'word ' * 60}\nThe king\n", *options)
    assert re.search(r"this text is too long: with the template it has \d+ of 64 tokens", said)
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "tiny"], "has no chat template; it is a base model"),
        (["chat", str(ROOT / "tests/data/goldens/g8-a-emb128-k16")], "has no tokenizer"),
        (["chat", "/no/such"], "/no/such"),
        ([*CHAT[3:], "--system", "x", "--chat-template", "{{ raise_exception('no system here') }}"], "no system here"),
    ],
)
def test_what_cannot_be_talked_to(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("grok-engine: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
