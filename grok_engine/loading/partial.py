"""A new folder or file that appears whole or not at all.

What is written lies in a hidden folder `.OUT.XXXXXXXX.partial` beside OUT, whose name no other process has, until it is
complete and takes its own name. Whoever writes it holds a lock on that folder. A folder without its lock was left by a
process that was killed: the next one that writes the same OUT removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from grok_engine.checkpoint.new_file import NewFile
from grok_engine.config import ConfigError

SPARE = 1 << 20  # bytes for the file system's own records
_NO_ROOM = {
    errno.ENOSPC: "the disk was full",
    errno.EDQUOT: "the quota was reached",
    errno.EFBIG: "the file system or a limit takes no file of that size",
}


def check_new(out: Path, model: Path) -> None:
    """ConfigError unless `out` can be made: it does not exist, its folder does, and it is not inside of `model`.

    Removes what processes that were killed left beside it.
    """
    _sweep(out)
    if os.path.lexists(out) or not out.parent.is_dir():
        what = "exists" if os.path.lexists(out) else f"has no folder {out.parent} to be in"
        raise ConfigError(f"{out} {what}: expected a new name in a folder that is there")
    if model.is_dir() and out.resolve().is_relative_to(model.resolve()):
        raise ConfigError(f"{out} is inside of the model's own folder {model}: expected a name outside")


def write_new(
    out: Path,
    weights: Sequence[NewFile],
    files: Mapping[str, bytes],
    progress: Callable[[int, int], None] | None = None,
    *,
    single: bool = False,
) -> None:
    """Make the folder `out` of `weights` and small `files`; `single`: the file `out` of the only one of `weights`.

    A reader needs the last of `files`, and the head of each of `weights`: they are written when the rest is on the
    disk. ConfigError where the disk has no room, before anything is written if that can be known. SIGTERM and SIGHUP
    end the process with their status, and leave nothing.
    """
    need = sum(file.nbytes for file in weights) + sum(map(len, files.values())) + SPARE
    if need > (free := shutil.disk_usage(out.parent).free):
        raise ConfigError(f"{out} needs {need:,} bytes, {free:,} are free there")
    total, done = need - SPARE, 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress and count:
            progress(done, total)

    with _signals(), _partial(out) as partial:
        try:
            for file in weights:
                _write_weights(partial / file.name, file, report)
            for name, content in files.items():
                _write(partial / name, content)
                report(len(content))
            _sync(partial)
        except OSError as error:
            if (what := _NO_ROOM.get(error.errno or 0)) is None:
                raise
            raise ConfigError(f"{out} needs {need:,} bytes: {what}, after {done:,}") from None
        _rename(partial / weights[0].name if single else partial, out)
        _sync(out.parent)


def _sweep(out: Path) -> None:
    """Remove what is left beside `out`, unless another process is writing it."""
    for path in out.parent.glob(f".{_escaped(out.name)}.????????.partial"):
        with suppress(OSError):
            lock = _locked(path, wait=False)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _locked(path: Path, *, wait: bool) -> int | None:
    """A descriptor of a folder that holds its lock; None where another process holds it, or where it is gone. OSError
    for a file system without locks."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        found = os.fstat(folder)
        there = path.stat() if path.exists() else None
        if there is not None and (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino):
            return folder
    except BlockingIOError:
        pass
    except OSError:
        os.close(folder)
        raise
    os.close(folder)
    return None


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A hidden folder that is gone afterwards, unless it got its name."""
    lock: int | None = None
    partial: Path | None = None
    try:
        while lock is None:  # another process may take a folder for a leftover before it is locked, and remove it
            partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")  # known before it is there
            try:
                partial.mkdir()
            except OSError:
                partial = None  # nothing of ours
                raise
            try:
                lock = _locked(partial, wait=True)
            except OSError:  # no locks here, so nothing is ever swept either
                break
        assert partial is not None
        yield partial
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _write_weights(path: Path, file: NewFile, report: Callable[[int], None]) -> None:
    with path.open("wb", buffering=0) as out:
        at = -1
        for start, part in file.body():
            if start != at:
                out.seek(start)
            _write_all(out.fileno(), part)
            at = start + len(part)
            report(len(part))
        out.truncate(file.nbytes)
        os.fsync(out.fileno())
        out.seek(0)
        _write_all(out.fileno(), memoryview(file.head))
        report(len(file.head))
        os.fsync(out.fileno())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _write_all(file: int, part: memoryview) -> None:
    at = 0
    while at < len(part):  # a call may write less, and writes at most 2 GiB
        at += os.write(file, part[at:])


def _sync(folder: Path) -> None:
    """Put a folder's names on the disk, where the file system does that for folders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _rename(partial: Path, out: Path) -> None:
    """Give it its name, if nothing has it by now."""
    if os.path.lexists(out):  # rename would replace a file or an empty folder
        raise ConfigError(f"{out} exists by now: another process made it meanwhile")
    partial.rename(out)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, SIGINT KeyboardInterrupt, where nobody else handles them and where they can
    be handled: in the main thread. After the first one all are ignored: a second must not cut the removal short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    ours = {n: old for n, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise (
            KeyboardInterrupt
            if ours[signal.Signals(number)] is signal.default_int_handler
            else SystemExit(128 + number)
        )

    try:
        for each in ours:
            signal.signal(each, stop)
        yield
    finally:
        for each, old in ours.items():
            signal.signal(each, old)
