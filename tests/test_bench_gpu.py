"""`make bench-gpu` without a GPU: its driver with stages of the tests' own, and what each real command says here."""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from sysconfig import get_config_var
from typing import Any

import pytest
import torch

from benchmarks.gpu import run as module
from benchmarks.gpu.run import SKIPPED, Command, Outcome, Stage, run, summary
from benchmarks.gpu.slowest import slowest
from benchmarks.gpu.stages import ROOT, _build, stages
from grok_bench import schema
from grok_engine.cli import main as engine_main
from tests.report_samples import environment

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def python(name: str, code: str, **options: Any) -> Command:
    return Command(name, (sys.executable, "-c", code), **options)


def outcomes(
    tmp_path: Path, *commands: Command, limit: float = 20.0, correctness: bool = True, at_once: bool = True
) -> dict[str, Outcome]:
    said: list[str] = []
    found = run(Stage("stage", lambda: commands, limit, correctness, at_once), tmp_path, said.append)
    assert said[0] == "== stage"
    return {o.command: o for o in found}


def test_what_becomes_of_processes(tmp_path: Path) -> None:
    found = outcomes(
        tmp_path,
        python("good", "import os; print('1 passed', os.environ['X'])", env={"X": "here"}),
        python("bad", "raise SystemExit('wrong numbers')"),
        python("unable", f"print('there is no GPU'); raise SystemExit({SKIPPED})"),
        python("refused", "print('==ERROR== Device not supported'); raise SystemExit(1)", refusals=("Device not supported",)),
        Command("absent", ("no-such-tool", "--version")),
    )  # fmt: skip
    assert {name: o.status for name, o in found.items()} == {
        "good": "passed", "bad": "failed", "unable": "missing", "refused": "missing", "absent": "missing",
    }  # fmt: skip
    assert found["good"].said == "1 passed here"
    assert found["bad"].said == "status 1; wrong numbers"
    assert found["absent"].said == "no-such-tool is not on the path"
    assert [name for name, o in found.items() if o.bad] == ["bad"]
    assert "wrong numbers" in (tmp_path / "bad.log").read_text()


def test_what_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One saves what it has when interrupted; one does not listen, nor does its child."""
    monkeypatch.setattr(module, "GRACE", 0.5)
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
    assert {name: o.status for name, o in found.items()} == {"deaf": "timed out", "polite": "timed out", "quick": "passed"}  # fmt: skip
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
    wait = "import pathlib, sys, time\npathlib.Path('{a}').touch()\nwhile not pathlib.Path('{b}').exists(): time.sleep(0.01)"
    a, b = tmp_path / "a", tmp_path / "b"
    found = outcomes(tmp_path, python("a", wait.format(a=a, b=b)), python("b", wait.format(a=b, b=a)))
    assert [o.status for o in found.values()] == ["passed", "passed"]


def test_commands_of_a_measurement_run_one_after_another(tmp_path: Path) -> None:
    alone = "import os, time\nos.mkdir('X')\ntime.sleep(0.2)\nos.rmdir('X')".replace("X", str(tmp_path / "running"))
    hangs = python("hangs", "import time; time.sleep(600)")
    commands = (python("a", alone), python("b", alone), hangs, python("never", alone))
    found = outcomes(tmp_path, *commands, limit=4.0, at_once=False)
    assert [o.status for o in found.values()] == ["passed", "passed", "timed out", "missing"]
    assert found["never"].said == "the stage's 4 s were over"


def test_a_stage_that_lacks_what_an_earlier_one_leaves(tmp_path: Path) -> None:
    said: list[str] = []
    (found,) = run(Stage("profiles", lambda: [slowest(tmp_path / "none.json")], 5), tmp_path, said.append)  # type: ignore[list-item]
    assert found.status == "missing"
    assert "none.json cannot be read" in found.said
    assert run(Stage("nothing to do", lambda: [], 5, correctness=True), tmp_path, said.append) == []


def test_summary(tmp_path: Path) -> None:
    def outcome(command: str, status: Any, correctness: bool) -> Outcome:
        return Outcome("stage", command, status, 1.0, "said", tmp_path / "log", correctness)

    lines = summary([outcome("tests", "passed", True), outcome("ncu", "missing", False), outcome("kernels", "failed", False)])  # fmt: skip
    assert lines[-2:] == ["   not run: ncu", "   every correctness stage that ran has passed"]
    lines = summary([outcome("tests", "failed", True), outcome("memcheck", "timed out", True)])
    assert lines[-1] == "   NOT CORRECT: tests, memcheck"


def test_the_slowest(tmp_path: Path) -> None:
    """By the best of ours; neither a problem that is all launch, nor one where ours failed."""

    def result(name: str, floor: float, *shares: tuple[str, bool, float | None]) -> schema.KernelResult:
        scores = [
            schema.Score(contestant=c, ours=ours, status="ok" if share else "failed", share_of_roofline=share)
            for c, ours, share in shares
        ]
        return schema.KernelResult(
            problem=name, op="moe", family="grok-1", parameters={}, operations=1.0, bytes=1.0, arithmetic="bf16",
            floor_seconds=floor, rounds=9, thrown_away=0, best_peer=None, scores=scores,
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


def test_the_stages(tmp_path: Path) -> None:
    found = stages("chip-day", tmp_path, ["moe/*"])
    assert [s.name for s in found if s.correctness] == ["correctness"]
    assert sum(s.limit for s in found if s.name != "build") <= 8 * 60
    for stage in found[:-1]:
        names = [c.name for c in stage.commands()]
        assert len(set(names)) == len(names)
        for command in stage.commands():
            files = [arg for arg in command.argv if arg.startswith("tests/")]
            assert all((ROOT / file).exists() for file in files)
    assert "bench-gpu:" in (ROOT / "Makefile").read_text()


def test_modules_are_built_where_they_are_missing_or_old(tmp_path: Path) -> None:
    source = tmp_path / "csrc" / "x.cpp"
    source.parent.mkdir()
    source.touch()
    modules = [tmp_path / f"{name}{get_config_var('EXT_SUFFIX')}" for name in ("_C", "_CUDA")]
    assert len(_build(tmp_path, source.parent)) == 1
    for file in modules:
        file.touch()
    assert _build(tmp_path, source.parent) == []
    os.utime(modules[0], (1, 1))
    assert len(_build(tmp_path, source.parent)) == 1


@no_gpu
@pytest.mark.parametrize("name", ["about", "small", "once", "__main__"])
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench-gpu"])
    main = import_module(f"benchmarks.gpu.{name}").main
    assert main(*(["moe/*", "any"] if name == "once" else [])) == (2 if name == "__main__" else SKIPPED)
    said = capsys.readouterr()
    assert (said.out + said.err).removeprefix("bench-gpu: ") == "there is no GPU\n"


@no_gpu
def test_the_engine_s_commands_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for stage in stages("chip-day", tmp_path)[:-1]:
        for command in stage.commands() if stage.name not in ("build", "correctness") else ():
            if "grok_engine.cli" in command.argv:
                assert engine_main([*command.argv[3:]]) == 2
                said = capsys.readouterr().err
                assert len(said.splitlines()) == 1
                assert "no device 'cuda' here" in said or "device='cuda' cannot be used" in said
                ran += 1
    assert ran == 3


@no_gpu
def test_the_tests_without_a_gpu(tmp_path: Path) -> None:
    (found,) = outcomes(tmp_path, next(c for s in stages("x", tmp_path) if s.correctness for c in s.commands())).values()  # fmt: skip
    assert found.status == "failed"
    assert "GROK_TEST_DEVICE=cuda, and there is no GPU" in found.said
    assert "Traceback" not in found.log.read_text()


def test_the_tests_for_a_gpu_work(tmp_path: Path) -> None:
    """On copies on the CPU, at small sizes: what is wrong in them shows here, and not where there is a GPU for minutes."""
    chosen = "selected and not 9- and not 1- or tiny-float32-float32 or grok-1-int8 or folder"
    argv = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", chosen)
    (found,) = outcomes(tmp_path, Command("tests", argv, {"GROK_TEST_DEVICE": "cpu:0"}), limit=1200.0).values()
    assert found.status == "passed", found.log.read_text()[-2000:]
    assert int(found.said.split(" passed")[0].split()[-1]) > 50
