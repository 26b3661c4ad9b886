"""Stages, each of processes of their own with a time limit: what fails or hangs ends alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["passed", "failed", "timed out", "missing"]
SKIPPED = 77  # the status of a process that cannot do its work here, and has said why
GRACE = 10.0  # seconds to save what there is after an interrupt
SHOWN = 12  # lines of a failure


@dataclass(frozen=True)
class Command:
    """One process. `refusals` are words of a tool that cannot work on this machine, which is then missing."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    refusals: Sequence[str] = ()


@dataclass(frozen=True)
class Stage:
    """Commands, made when it begins. `at_once`: they run side by side, as those that measure must not."""

    name: str
    commands: Callable[[], Sequence[Command]]
    limit: float
    correctness: bool = False  # whether its failure is that of the whole
    at_once: bool = False


@dataclass(frozen=True)
class Outcome:
    stage: str
    command: str
    status: Status
    seconds: float
    said: str  # its last line, or why it is missing
    log: Path
    correctness: bool

    @property
    def bad(self) -> bool:
        return self.correctness and self.status in ("failed", "timed out")


def run(stage: Stage, folder: Path, say: Callable[[str], None] = print) -> list[Outcome]:
    """Run a stage; each command's output is a file in `folder`."""
    say(f"== {stage.name}")
    outcomes: list[Outcome] = []
    running: list[_Running] = []
    commands: list[Command] = []
    try:
        commands += stage.commands()
    except Exception as error:  # a stage that reads what an earlier one did not leave
        outcomes.append(_outcome(stage, stage.name, "missing", 0.0, f"{type(error).__name__}: {error}", folder))
    end = time.monotonic() + stage.limit
    try:
        while commands or running:
            late = time.monotonic() > end
            if late:
                _end([r.process for r in running])
            for r in [r for r in running if r.process.poll() is not None]:
                running.remove(r)
                _end([r.process])  # what it left behind
                outcomes.append(_judged(stage, r, late))
            while commands and (stage.at_once or not running):
                command = commands.pop(0)
                log = folder / f"{command.name}.log"
                why = "" if shutil.which(command.argv[0]) else f"{command.argv[0]} is not on the path"
                if why or late:
                    why = why or f"the stage's {stage.limit:g} s were over"
                    outcomes.append(_outcome(stage, command.name, "missing", 0.0, why, log))
                else:
                    running.append(_started(command, log))
            time.sleep(0.05)
    finally:
        _end([r.process for r in running])
    for outcome in outcomes:
        say(f"   {_line(outcome)}")
        if outcome.status in ("failed", "timed out"):
            for text in _tail(outcome.log)[-SHOWN:]:
                say(f"      | {text}")
    return outcomes


@dataclass
class _Running:
    command: Command
    process: subprocess.Popen[bytes]
    log: Path
    began: float


def _started(command: Command, log: Path) -> _Running:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, **command.env}, start_new_session=True,
        )  # fmt: skip
    return _Running(command, process, log, time.monotonic())


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt them with all that they started; whoever is there after that is ended."""
    for number, grace in ((signal.SIGINT, GRACE), (signal.SIGKILL, 1.0)):
        for process in processes:
            _signal(process, number)
        end = time.monotonic() + grace
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(0.05)
        if number == signal.SIGINT and all(process.poll() is not None for process in processes):
            for process in processes:
                _signal(process, signal.SIGKILL)  # children that outlive it
            return


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _judged(stage: Stage, r: _Running, late: bool) -> Outcome:
    command, code, lines = r.command, r.process.returncode, _tail(r.log)
    said = lines[-1] if lines else ""
    refused = next((line for line in lines if any(word in line for word in command.refusals)), None)
    if code == SKIPPED:
        status: Status = "missing"
    elif late:
        status, said = "timed out", f"after {stage.limit:g} s; {said}"
    elif refused is not None:
        status, said = "missing", refused
    else:
        status = "failed" if code else "passed"
        said = f"status {code}; {said}" if code else said
    return _outcome(stage, command.name, status, time.monotonic() - r.began, said, r.log)


def _outcome(stage: Stage, command: str, status: Status, seconds: float, said: str, log: Path) -> Outcome:
    return Outcome(stage.name, command, status, seconds, said.strip()[:160], log, stage.correctness)


def _tail(log: Path) -> list[str]:
    if not log.is_file():
        return []
    text = log.read_bytes()[-20_000:].decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _line(o: Outcome) -> str:
    return f"{o.status:9} {o.seconds:6.1f} s  {o.command:18} {o.said}"


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    lines = ["", "== summary", *(f"   {_line(o)}" for o in outcomes)]
    bad = [o.command for o in outcomes if o.bad]
    missing = [o.command for o in outcomes if o.status == "missing"]
    if missing:
        lines.append(f"   not run: {', '.join(missing)}")
    return [*lines, f"   NOT CORRECT: {', '.join(bad)}" if bad else "   every correctness stage that ran has passed"]
