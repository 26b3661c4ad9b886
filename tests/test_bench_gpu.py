"""`make bench-gpu` without a GPU: its driver with stages of the tests' own, and what each real command says here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import ROOT, bundle, load
from benchmarks.gpu import run as module
from benchmarks.gpu.profile import slowest
from benchmarks.gpu.run import SKIPPED, WRONG, Command, Outcome, Stage, archive, run, run_part, summary
from benchmarks.gpu.stages import PARTS, Run, first, second
from grok_bench import schema
from grok_engine.cli import main as engine_main
from tests.report_samples import environment

MORE = pytest.mark.skipif("GROK_TEST_MORE" not in os.environ, reason="a minute: `make more` rehearses it")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def python(name: str, code: str, **options: Any) -> Command:
    return Command(name, (sys.executable, "-c", code), **options)


def outcomes(
    tmp_path: Path, *commands: Command, limit: float = 20.0, gate: Any = "all", at_once: bool = True
) -> dict[str, Outcome]:
    said: list[str] = []
    found = run(Stage("stage", lambda _: commands, limit, gate, at_once), tmp_path, say=said.append)
    assert said[0] == "== stage"
    return {o.command: o for o in found}


def test_what_becomes_of_processes(tmp_path: Path) -> None:
    found = outcomes(
        tmp_path,
        python("good", "import os; print('1 passed', os.environ['X'])", env={"X": "here"}),
        python("bad", "raise SystemExit('wrong numbers')"),
        python("unable", f"print('there is no GPU'); raise SystemExit({SKIPPED})"),
        Command("absent", ("no-such-tool", "--version")),
    )  # fmt: skip
    assert {name: o.status for name, o in found.items()} == {
        "good": "passed", "bad": "failed", "unable": "missing", "absent": "missing",
    }  # fmt: skip
    assert found["good"].said == "1 passed here"
    assert found["bad"].said == "status 1; wrong numbers"
    assert found["absent"].said == "no-such-tool is not on the path"
    assert {name for name, o in found.items() if o.bad} == {"bad", "unable", "absent"}
    assert "wrong numbers" in (tmp_path / "bad.log").read_text()


def test_what_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One saves what it has when interrupted; one does not listen, nor does its child."""
    monkeypatch.setattr(module, "GRACE", 2.0)
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], preexec_fn=lambda: None);"
        "open('CHILD', 'w').write(str(child.pid)); print('started', flush=True); time.sleep(600)"
    ).replace("CHILD", str(tmp_path / "child"))
    polite = (
        "import time\ntry:\n print('waiting', flush=True)\n time.sleep(600)\nexcept KeyboardInterrupt:\n print('saved')"
    )
    began = time.monotonic()
    found = outcomes(tmp_path, python("deaf", deaf), python("polite", polite), python("quick", "print(1)"), limit=3.0)
    assert time.monotonic() - began < 15
    late = "timed out"
    assert {name: o.status for name, o in found.items()} == {"deaf": late, "polite": late, "quick": "passed"}
    assert found["polite"].said == "after 3 s; saved"
    assert found["deaf"].bad
    pid = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {pid} is still there")


def test_commands_of_a_stage_run_at_the_same_time(tmp_path: Path) -> None:
    wait = "import pathlib, time; pathlib.Path('{a}').touch()\nwhile not pathlib.Path('{b}').exists(): time.sleep(0.01)"
    a, b = tmp_path / "a", tmp_path / "b"
    found = outcomes(tmp_path, python("a", wait.format(a=a, b=b)), python("b", wait.format(a=b, b=a)))
    assert [o.status for o in found.values()] == ["passed", "passed"]


def test_commands_of_a_measurement_run_one_after_another(tmp_path: Path) -> None:
    alone = "import os, time\nos.mkdir('X')\ntime.sleep(0.2)\nos.rmdir('X')".replace("X", str(tmp_path / "running"))
    hangs = python("hangs", "import time; time.sleep(600)")
    commands = (python("a", alone), python("b", alone), hangs, python("never", alone))
    found = outcomes(tmp_path, *commands, limit=4.0, at_once=False)
    assert [o.status for o in found.values()] == ["passed", "passed", "timed out", "missing"]
    assert found["never"].said == "its 4 s were over before it began"


def test_a_stage_that_lacks_what_an_earlier_one_leaves(tmp_path: Path) -> None:
    said: list[str] = []
    stage = Stage("profiles", lambda _: [slowest(tmp_path / "none.json")], 5)  # type: ignore[list-item]
    (found,) = run(stage, tmp_path, say=said.append)
    assert found.status == "missing"
    assert "none.json cannot be read" in found.said
    assert run(Stage("nothing to do", lambda _: [], 5, "all"), tmp_path, say=said.append) == []


def test_what_makes_a_run_a_failure() -> None:
    """A stage that must pass also fails by being late or missing; one that measures by failing; others never."""
    expected = {"all": (False, True, True, True), "failed": (False, True, False, False), "none": (False,) * 4}
    for gate, bad in expected.items():
        stage = Stage("stage", lambda _: [], 1.0, gate)  # type: ignore[arg-type]
        assert tuple(map(stage.bad, ("passed", "failed", "timed out", "missing"))) == bad


def test_summary(tmp_path: Path) -> None:
    def outcome(command: str, status: Any, bad: bool) -> Outcome:
        return Outcome(command, status, 1.0, "said", tmp_path / "log", bad)

    statuses = {"tests": "passed", "ncu": "missing", "kernels": "timed out"}
    lines = summary([outcome(name, status, False) for name, status in statuses.items()])
    assert lines[-2:] == ["   not run, or not to its end: ncu, kernels", "   everything that must pass has passed"]
    lines = summary([outcome("tests", "failed", True), outcome("small-cuda", "missing", True)])
    assert lines[-1] == "   NOT CORRECT: tests (failed), small-cuda (missing)"


def test_a_part_ends_in_time_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages whose limits are more than the part's: the second is cut, the third does not begin, all is kept."""
    for name, seconds in (("GRACE", 0.5), ("LAST", 0.2), ("EVERY", 0.2)):
        monkeypatch.setattr(module, name, seconds)
    kept: list[int] = []
    hangs = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    stages = [
        Stage("one", lambda _: [python("good", "print('done')")], 60),
        Stage("two", lambda o: [python(f"after-{o[0].command}", hangs)], 60),
        Stage("three", lambda _: [python("late", "print('never')")], 60, "all"),
    ]
    began = time.monotonic()
    found = run_part(stages, tmp_path, 3.0, lambda: kept.append(len(list(tmp_path.iterdir()))), lambda line: None)
    assert time.monotonic() - began < 6
    said = [(o.command, o.status, o.bad) for o in found]
    assert said == [("good", "passed", False), ("after-good", "timed out", False), ("late", "missing", True)]
    assert len(kept) > 5
    assert kept[0] == 1


def test_without_what_the_rest_needs_the_part_ends(tmp_path: Path) -> None:
    said: list[str] = []
    stages = [
        Stage("load", lambda _: [python("load", f"raise SystemExit({SKIPPED})")], 20, "all", needed=True),
        Stage("figures", lambda _: [python("never", "")], 20),
    ]  # fmt: skip
    found = run_part(stages, tmp_path, 60.0, lambda: None, said.append)
    assert [(o.command, o.status, o.bad) for o in found] == [("load", "missing", True)]
    assert "the rest is not run" in said[-1]


def test_an_archive_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "name"
    folder.mkdir()
    (folder / "kernels.json").write_text("{}")
    (folder / ".kernels.json.1.partial").write_text("{")
    (folder / "long.log").write_bytes(b"x" * module.MOST_LOG + b"end")
    (tmp_path / "h100.json").write_text("tuned")
    archive(folder, tmp_path / "name.tar.gz", [tmp_path / "h100.json"])
    with tarfile.open(tmp_path / "name.tar.gz") as tar:
        assert tar.getnames() == ["name/kernels.json", "name/long.log", "name/h100.json"]
        log = tar.extractfile("name/long.log")
        assert log is not None
        assert log.read().endswith(b"xend")
        assert tar.getmember("name/long.log").size == module.MOST_LOG
    assert not list(tmp_path.glob(".*partial"))


def test_the_slowest(tmp_path: Path) -> None:
    """By the best of ours; neither a problem that is all launch, nor one where ours failed."""

    def result(name: str, floor: float, *shares: tuple[str, bool, float | None]) -> schema.KernelResult:
        scores = [
            schema.Score(contestant=c, ours=ours, status="ok" if share else "failed", roofline=share)
            for c, ours, share in shares
        ]
        return schema.KernelResult(
            problem=name, op="moe", parameters={}, operations=1.0, bytes=1.0, arithmetic="bf16",
            floor_seconds=floor, rounds=9, scores=scores,
        )  # fmt: skip

    results = [
        result("fine", 1e-3, ("grok_kernels triton", True, 0.9), ("torch", False, 0.1)),
        result("slow", 1e-3, ("grok_kernels triton", True, 0.3), ("grok_kernels cuda", True, 0.4)),
        result("slower", 1e-3, ("grok_kernels triton", True, 0.2), ("grok_kernels reference", True, 0.5)),
        result("tiny", 1e-6, ("grok_kernels triton", True, 0.01)),
        result("failed", 1e-3, ("grok_kernels triton", True, None)),
    ]
    file = tmp_path / "found.json"
    schema.ResultFile(kind="kernels", command="", environment=environment(), results=results).save(file)
    assert slowest(file, 2) == [("slower", "grok_kernels triton"), ("slow", "grok_kernels cuda")]


def test_the_parts(tmp_path: Path) -> None:
    """The limits of both; what their commands name is there."""
    for name, part in PARTS.items():
        stages = part.stages(Run(tmp_path))
        assert part.limit == {"first": 240, "second": 420}[name]
        assert stages[0].needed
        assert stages[0].gate == "all"
        for stage in stages:
            commands = [] if stage.name == "profiles" else stage.commands([])
            names = [c.name for c in commands]
            assert len(set(names)) == len(names)
            for command in commands:
                files = [arg for arg in command.argv if arg.startswith("tests/")]
                assert all((ROOT / file).exists() for file in files)
    assert "bench-gpu:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("status", "code", "lost"),
    [("passed", 0, False), ("failed", WRONG, False), ("failed", 1, True), ("timed out", -9, True)],
)
def test_if_the_kernels_by_hand_hang_the_rest_goes_on_with_triton(
    tmp_path: Path, status: Any, code: int, lost: bool
) -> None:
    """Wrong numbers are named where they are measured; what hangs or faults would end that process."""
    outcomes = [Outcome("middling-cuda", status, 1.0, "", tmp_path, status != "passed", code)]
    stages = {stage.name: stage for stage in first(Run(tmp_path))}
    (figures,) = stages["figures"].commands(outcomes)
    assert ("grok_kernels cuda*" in figures.argv) != lost
    assert "grok_kernels triton*" in figures.argv
    (decode,) = stages["decode with graphs"].commands(outcomes)
    assert (decode.env.get("GROK_KERNELS_BACKEND") == "triton") == lost


def rehearsal(part: str, tmp_path: Path) -> tuple[dict[str, str], list[str]]:
    """Each file of the archive, and the lines printed. Stand-ins for ncu and compute-sanitizer run their command."""
    for tool in ("ncu", "compute-sanitizer"):
        file = tmp_path / "bin" / tool
        file.parent.mkdir(exist_ok=True)
        file.write_text('#!/bin/sh\nwhile [ "${1#*python}" = "$1" ]; do shift; done\nexec "$@"\n')
        file.chmod(0o755)
    command = [sys.executable, "-m", "benchmarks.gpu", part, "--rehearse", "--out", str(tmp_path / "out")]
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").iterdir()
    assert file.name.startswith("rehearsal-")
    found: dict[str, str] = {}
    with tarfile.open(file) as tar:
        for member in tar.getmembers():
            opened = tar.extractfile(member)
            assert opened is not None
            found[Path(member.name).name] = opened.read().decode()
    return found, done.stdout.splitlines()


def test_a_rehearsal_of_the_first_part(tmp_path: Path) -> None:
    """Every command really runs, on the CPU; what it leaves comes back."""
    found, said = rehearsal("first", tmp_path)
    assert set(found) >= {
        "summary.txt", "load.log", "small-cuda.log", "small-triton.log", "kernels.json", "kernels.log",
        "decode-graphs.json", "decode-eager.json", "tune-swapped.log",
    }  # fmt: skip
    assert "all modules load" in found["load.log"]
    assert "calls of the cpu backend are right" in found["small-cuda.log"]
    assert "calls of the triton backend are right" in found["small-triton.log"]
    assert len(json.loads(found["kernels.json"])["results"]) > 10
    eager = json.loads(found["decode-eager.json"])["results"][0]
    assert (eager["protocol"], eager["completed"]) == ("latency", 1)
    assert said[-2] == "   everything that must pass has passed"
    assert found["summary.txt"].splitlines() == said


@MORE
def test_a_rehearsal_of_the_second_part(tmp_path: Path) -> None:
    found, said = rehearsal("second", tmp_path)
    logs = {name for name in found if name.endswith(".log")}
    assert logs == {
        "load.log", "tune-swapped.log", "tune.log", "full-size-0.log", "full-size-1.log", "full-size-2.log",
        "engine-0.log", "memory.log", "kernels.log", "kernels-compiling.log",
        "ncu-rms_norm-grok-1-decode-t64.log", "memcheck.log", "racecheck.log",
    }  # fmt: skip
    for name in ("full-size-0.log", "full-size-1.log", "full-size-2.log", "engine-0.log", "memory.log"):
        assert " passed" in found[name]
        assert "failed" not in found[name]
    assert said[-2] == "   everything that must pass has passed"


@pytest.mark.parametrize("have", ["other Python", "other torch", "other sources", "all"])
def test_a_bundle_is_taken_where_it_fits(have: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton.runtime.cache")
    folder, package, cache = (tmp_path / name for name in ("bundle", "package", "cache"))
    package.mkdir()
    kernel = folder / "triton/KEY"
    kernel.mkdir(parents=True)
    for name in ("_C.so", "_CUDA.so"):
        (folder / name).write_text("module")
    (kernel / "k.cubin").write_text("code")
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.cubin": "/x/k.cubin", "k.ttir": "/x/k.ttir"}}))
    about = {"suffix": ".so", "torch": torch.__version__, "triton": triton.triton_key(), "sources": bundle.sources()}
    other = {"other Python": "suffix", "other torch": "torch", "other sources": "sources"}
    if have in other:
        about[other[have]] = "other"
    (folder / bundle.ABOUT).write_text(json.dumps(about))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    refused = bundle.unpack(folder, package, ".so")
    assert bool(refused) == (have != "all")
    assert len(list(package.iterdir())) == (0 if refused else 2)
    files = json.loads((cache / "KEY/__grp__k.json").read_text())["child_paths"]
    assert files == {"k.cubin": str(cache / "KEY/k.cubin")}
    assert (cache / "KEY/k.cubin").read_text() == "code"


def test_a_module_that_is_not_there_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load._missing(("_C", "_NONE"), rehearse=True) == 1
    said = capsys.readouterr().out
    assert "_C                 loads" in said
    assert "_NONE              DOES NOT LOAD: No module named 'grok_kernels._NONE'" in said
    assert "1 of the modules and backends are not there" in said
    if not torch.cuda.is_available():
        assert load._missing((), rehearse=False) >= 1  # those by hand; Triton's may be interpreted


def test_modules_are_built_where_they_are_missing_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PACKAGE", tmp_path)
    assert load._old("_C")
    module_file = tmp_path / f"_C{load.SUFFIX}"
    module_file.touch()
    assert not load._old("_C")
    os.utime(module_file, (0, 0))
    assert load._old("_C")


@no_gpu
@pytest.mark.parametrize("name", ["load", "small", "profile", "__main__"])
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"load": [], "small": ["cuda"], "profile": ["moe/*", "any"], "__main__": ["first"]}
    monkeypatch.setattr(sys, "argv", ["bench-gpu", *arguments[name]])
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert import_module(f"benchmarks.gpu.{name}").main() == (2 if name == "__main__" else SKIPPED)
    said = capsys.readouterr()
    assert (said.out + said.err).removeprefix("bench-gpu: ") == "there is no GPU\n"


@no_gpu
def test_the_engine_s_commands_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for stage in [*first(Run(tmp_path)), *second(Run(tmp_path))]:
        for command in [] if stage.name == "profiles" else stage.commands([]):
            if "grok_engine.cli" in command.argv:
                assert engine_main([*command.argv[3:]]) == 2
                said = capsys.readouterr().err
                assert len(said.splitlines()) == 1
                assert "no device 'cuda' here" in said or "device='cuda' cannot be used" in said
                ran += 1
    assert ran == 5


@MORE
def test_the_tests_for_a_gpu_work(tmp_path: Path) -> None:
    """They run on the CPU, at small sizes: what is wrong in them shows here, and not in minutes on a GPU."""
    chosen = "selected and not 9- and not 1- or tiny-float32-float32 or grok-1-int8 or folder"
    argv = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", chosen)
    (found,) = outcomes(tmp_path, Command("tests", argv, {"GROK_TEST_DEVICE": "cpu:0"}), limit=1200.0).values()
    assert found.status == "passed", found.log.read_text()[-2000:]
    assert int(found.said.split(" passed")[0].split()[-1]) > 50
