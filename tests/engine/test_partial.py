"""A conversion that is stopped, at any moment and in any way, leaves nothing that could be taken for its result."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import namedtuple
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from grok_engine import ConfigError, read_config
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.loading import partial
from grok_engine.loading.convert import convert

MODEL = Path(__file__).parents[1] / "data" / "hf" / "llama-a"
STEPS = ("_locked", "_write_weights", "_write_all", "_write", "_sync", "_rename")
# A server that has torch imported forks each process, which takes milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["grok_engine", "tests.engine.test_partial"])
Stages = list[tuple[int, str]]


def run(out: Path, format: Any, stop_at: int, pipe: Connection) -> None:
    """Convert, and stop before step `stop_at` until the pipe says to go on; sends the steps."""
    count = 0

    def watched(name: str, original: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            nonlocal count
            pipe.send((count, name))
            if count == stop_at:
                pipe.send("stopped")
                pipe.recv()
            count += 1
            return original(*args, **options)

        return step

    for name in STEPS:
        setattr(partial, name, watched(name, getattr(partial, name)))
    try:
        convert(MODEL, out, format=format)
        pipe.send("done")
    except ConfigError as error:
        pipe.send(error)


class Child:
    def __init__(self, out: Path, format: str, stop_at: int) -> None:
        self.pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=run, args=(out, format, stop_at, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.stages: Stages = []

    def wait(self) -> Any:
        """For its next message that is no step."""
        assert self.pipe.poll(60)
        while isinstance(message := self.pipe.recv(), tuple):
            self.stages.append(message)
        return message

    def end(self, number: int) -> int | None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        self.process.join(60)
        return self.process.exitcode


def name_of(format: str) -> str:
    return "out.gguf" if format == "gguf" else "out"


def content(path: Path) -> dict[str, bytes]:
    files = path.iterdir() if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Stages]]:
    """Conversions that nobody stops, and their steps."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for format in ("hf", "gguf", "packed"):
        (folder / format).mkdir()
        child = Child(folder / format / name_of(format), format, -1)
        assert child.wait() == "done"
        found[format] = folder / format / name_of(format), child.stages
    return found


def stages_of(stages: Stages, steps: tuple[str, ...]) -> list[int]:
    """The first and the last of each kind."""
    found = [[i for i, kind in stages if kind == step] for step in steps]
    return sorted({pick(numbers) for numbers in found if numbers for pick in (min, max)})


@pytest.mark.parametrize(
    ("format", "number", "steps"),
    [
        ("hf", signal.SIGTERM, STEPS),
        ("hf", signal.SIGHUP, ("_write",)),
        ("hf", signal.SIGKILL, STEPS),
        ("gguf", signal.SIGKILL, ("_write_all", "_rename", "_sync")),
        ("packed", signal.SIGKILL, ("_write_all", "_rename")),
    ],
)
def test_stopped_at_any_moment(
    format: Any, number: signal.Signals, steps: tuple[str, ...], whole: dict[str, tuple[Path, Stages]], tmp_path: Path
) -> None:
    complete, stages = whole[format]
    expected, renamed = content(complete), max(i for i, kind in stages if kind == "_rename")
    for stage in stages_of(stages, steps):
        out = tmp_path / str(stage) / name_of(format)
        out.parent.mkdir()
        child = Child(out, format, stage)
        assert child.wait() == "stopped"
        code = child.end(number)
        left = [path for path in out.parent.iterdir() if path != out]
        assert out.exists() == (stage > renamed)
        if number != signal.SIGKILL:
            assert code == 128 + number
            assert not left
        for path in left:
            assert path.name.startswith(f".{out.name}.")
            assert path.name.endswith(".partial")
            try:
                config = read_config(path)
                open_checkpoint(path, config)
            except ConfigError:
                continue
            assert content(path).items() >= {k: v for k, v in expected.items() if format != "gguf"}.items()
        if stage > renamed:
            with pytest.raises(ConfigError, match="exists"):
                convert(MODEL, out, format=format)
        else:
            convert(MODEL, out, format=format)
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        found = content(out)
        assert {k: v for k, v in found.items() if k != "config.json"} == {
            k: v for k, v in expected.items() if k != "config.json"
        }


@pytest.fixture
def paused(tmp_path: Path, whole: dict[str, tuple[Path, Stages]]) -> Iterator[Child]:
    """A conversion to `out` in the middle of its weights."""
    writes = [i for i, kind in whole["hf"][1] if kind == "_write_all"]
    child = Child(tmp_path / "out", "hf", writes[len(writes) // 2])
    assert child.wait() == "stopped"
    yield child
    child.process.kill()
    child.process.join(60)


def test_what_another_is_writing_stays(paused: Child, tmp_path: Path) -> None:
    (theirs,) = tmp_path.iterdir()
    before = content(theirs)
    stop = threading.Event()

    def interrupted(done: int, total: int) -> None:
        if not stop.is_set():
            stop.set()
            assert theirs.is_dir()
            raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        convert(MODEL, tmp_path / "out", format="hf", progress=interrupted)
    assert list(tmp_path.iterdir()) == [theirs]
    assert content(theirs) == before
    convert(MODEL, tmp_path / "out", format="hf")  # which the other did not finish before
    paused.pipe.send("go on")
    assert "exists by now" in str(paused.wait())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_of_patterns_sweep_their_own_leftovers_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.12345678.partial").mkdir()
    (tmp_path / ".o[u]t.12345678.partial").mkdir()
    convert(MODEL, tmp_path / "o[u]t")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.12345678.partial", "o[u]t"]


def test_what_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name in ("out", "file", "dangling"):
        with pytest.raises(ConfigError, match=f"{name} exists: expected a new name"):
            convert(MODEL, tmp_path / name)
    with pytest.raises(ConfigError, match=r"has no folder .*nowhere to be in"):
        convert(MODEL, tmp_path / "nowhere" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "out"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_inside_the_model_is_refused(tmp_path: Path) -> None:
    model = convert(MODEL, tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(ConfigError, match="model exists"):
        convert(model, model)
    for out in (model / "out", tmp_path / "link" / "out"):
        with pytest.raises(ConfigError, match="is inside of the model's own folder"):
            convert(model, out, weights="bf16")


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1234))
    for format in ("packed", "hf"):
        with pytest.raises(ConfigError, match=r"out needs [\d,]+ bytes, 1,234 are free there"):
            convert(MODEL, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "what"), [(28, "the disk was full"), (27, "takes no file of that size")])
def test_a_disk_that_fills_up_meanwhile_is_one_error(
    number: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, part: memoryview) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(partial, "_write_all", full)
    with pytest.raises(ConfigError, match=rf"out needs [\d,]+ bytes: .*{what}, after 0"):
        convert(MODEL, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_conversion_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done > total / 2:
            assert [p.name.endswith(".partial") for p in tmp_path.iterdir()] == [True]
            raise error

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    with pytest.raises(error):
        convert(MODEL, tmp_path / "out", progress=progress)
    assert not list(tmp_path.iterdir())
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP))


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("first", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)]
)
def test_a_second_signal_does_not_cut_the_removal_short(
    first: signal.Signals,
    raised: type[BaseException],
    second: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remove = partial.shutil.rmtree

    def interrupted(path: Path, **options: Any) -> None:
        os.kill(os.getpid(), second)
        remove(path, **options)

    before = [signal.getsignal(number) for number in (first, second)]
    monkeypatch.setattr(partial.shutil, "rmtree", interrupted)
    with pytest.raises(raised):
        convert(MODEL, tmp_path / "out", progress=lambda done, total: os.kill(os.getpid(), first))
    assert not list(tmp_path.iterdir())
    assert before == [signal.getsignal(number) for number in (first, second)]


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(partial.fcntl, "flock", none)
    (tmp_path / ".out.12345678.partial").mkdir()
    convert(MODEL, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.12345678.partial", "out"]


def test_a_new_folder_has_the_rights_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    out = convert(MODEL, tmp_path / "out")
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    for format in ("packed", "hf", "gguf"):
        done: list[tuple[int, int]] = []
        out = tmp_path / name_of(format)
        convert(MODEL, out, format=format, progress=lambda now, total, done=done: done.append((now, total)))
        assert done == sorted(set(done))
        size = sum(map(len, content(out).values()))
        assert done[-1] == (size, size)
        if out.is_dir():
            out.rename(tmp_path / f"{format}-done")
