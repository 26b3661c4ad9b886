"""Stages of processes with a time limit: what fails or hangs ends alone, and what came before it is kept."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["passed", "failed", "timed out", "missing"]
SKIPPED = 77  # exit status of a process that cannot do its work here, and has said why
WRONG = 3  # exit status of a process that ran to its end and found wrong numbers
GRACE = 10.0  # seconds to save what there is after an interrupt
LAST = 2.0  # seconds to kill what ignored it, and to write the archive
SHOWN = 12  # lines of a failure's log
MOST_LOG = 2 << 20  # bytes of a log's end that are kept
EVERY = 10.0  # seconds between saves


@dataclass(frozen=True)
class Command:
    """One process."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    command: str
    status: Status
    seconds: float
    said: str  # the last line of its log, or why it is missing
    log: Path
    bad: bool = False  # whether it makes the whole run a failure
    code: int | None = None  # its exit status, negative for a signal; None if it never ran, or would not end


@dataclass(frozen=True)
class Stage:
    """Commands, made from all outcomes so far when the stage begins. `at_once` runs them in parallel: not for timings.

    `gate` says which outcomes make the whole run a failure: "all": any that did not pass, late or missing, too;
    "failed": failures alone; "none": no outcome, the stage only informs. After a bad outcome of a `needed` stage the
    part ends.
    """

    name: str
    commands: Callable[[Sequence[Outcome]], Sequence[Command]]
    limit: float
    gate: Literal["all", "failed", "none"] = "failed"
    at_once: bool = False
    needed: bool = False

    def bad(self, status: Status) -> bool:
        return {"all": status != "passed", "failed": status == "failed", "none": False}[self.gate]


def run_part(
    stages: Sequence[Stage], folder: Path, limit: float, keep: Callable[[], None], say: Callable[[str], None] = print
) -> list[Outcome]:
    """Run the stages in order within `limit` seconds, with logs in `folder`.

    `keep` saves the results so far, after each stage and every few seconds within one.
    """
    end = time.monotonic() + limit
    outcomes: list[Outcome] = []
    for stage in stages:
        left = end - time.monotonic() - GRACE - LAST
        outcomes += run(stage, folder, outcomes, min(stage.limit, left), keep, say)
        keep()
        if stage.needed and any(o.bad for o in outcomes):
            say(f"   the rest is not run: nothing of it would say anything without {stage.name!r}")
            break
    return outcomes


def run(
    stage: Stage,
    folder: Path,
    so_far: Sequence[Outcome] = (),
    limit: float | None = None,
    keep: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run one stage; each command's output is a file in `folder`."""
    limit = stage.limit if limit is None else limit
    say(f"== {stage.name}")
    outcomes: list[Outcome] = []
    running: list[_Running] = []
    commands: list[Command] = []
    try:
        commands += stage.commands(so_far)
    except Exception as error:  # the stage reads a file that an earlier one did not write
        outcomes.append(_outcome(stage, stage.name, "missing", 0.0, f"{type(error).__name__}: {error}", folder))
    end, saved = time.monotonic() + limit, time.monotonic()
    try:
        while commands or running:
            late = time.monotonic() > end
            if late:
                _end([r.process for r in running])
            for r in [r for r in running if late or r.process.poll() is not None]:
                running.remove(r)  # when late even if SIGKILL does not end it: the driver may hold it
                if not late:
                    _end([r.process])  # its children
                outcomes.append(_judged(stage, r, limit if late else None))
            while commands and (stage.at_once or not running):
                command = commands.pop(0)
                log = folder / f"{command.name}.log"
                why = "" if shutil.which(command.argv[0]) else f"{command.argv[0]} is not on the path"
                if why or late:
                    why = why or f"its {max(limit, 0.0):.0f} s were over before it began"
                    outcomes.append(_outcome(stage, command.name, "missing", 0.0, why, log))
                else:
                    running.append(_started(command, log))
            if time.monotonic() - saved > EVERY:
                keep()
                saved = time.monotonic()
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
    """Interrupt the process groups, and kill what is left after GRACE."""
    for number, grace in ((signal.SIGINT, GRACE), (signal.SIGKILL, 1.0)):
        for process in processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)  # children that outlived it, too
        end = time.monotonic() + grace
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(0.05)


def _judged(stage: Stage, r: _Running, late: float | None) -> Outcome:
    """The outcome of a process that ended; `late`: the seconds it had, if they were over."""
    code, said = r.process.returncode, (_tail(r.log) or [""])[-1]
    if code == SKIPPED:
        status: Status = "missing"
    elif late is not None:
        status, said = "timed out", f"after {late:.0f} s; {said}"
    elif code:
        status, said = "failed", f"status {code}; {said}"
    else:
        status = "passed"
    return _outcome(stage, r.command.name, status, time.monotonic() - r.began, said, r.log, code)


def _outcome(
    stage: Stage, command: str, status: Status, seconds: float, said: str, log: Path, code: int | None = None
) -> Outcome:
    return Outcome(command, status, seconds, said.strip()[:160], log, stage.bad(status), code)


def _tail(log: Path) -> list[str]:
    if not log.is_file():
        return []
    text = log.read_bytes()[-20_000:].decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _line(o: Outcome) -> str:
    return f"{o.status:9} {o.seconds:6.1f} s  {o.command:18} {o.said}"


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    lines = ["", "== summary", *(f"   {_line(o)}" for o in outcomes)]
    bad = [f"{o.command} ({o.status})" for o in outcomes if o.bad]
    late = [o.command for o in outcomes if not o.bad and o.status in ("missing", "timed out")]
    if late:
        lines.append(f"   not run, or not to its end: {', '.join(late)}")
    return [*lines, f"   NOT CORRECT: {', '.join(bad)}" if bad else "   everything that must pass has passed"]


def archive(folder: Path, file: Path, more: Sequence[Path] = ()) -> None:
    """All files of `folder`, and `more`, in one archive, written whole or not at all; of a long log only the end."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with tarfile.open(partial, "w:gz", compresslevel=6) as tar:
            for path in [*sorted(folder.iterdir()), *more]:
                if not path.is_file() or path.name.endswith(".partial"):
                    continue
                info = tarfile.TarInfo(f"{folder.name}/{path.name}")
                data = path.read_bytes()
                data = data[-MOST_LOG:] if path.suffix == ".log" else data
                info.size, info.mtime = len(data), int(path.stat().st_mtime)
                tar.addfile(info, io.BytesIO(data))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
