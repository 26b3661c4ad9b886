"""The benchmarks of a CPU run to their end at tiny sizes, and their rules hold. No time is looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_bench.schema import KernelResult, load
from grok_engine import ModelConfig
from grok_engine.checkpoint.layout import layout

STATUS = grok_kernels.backends()["rms_norm"]["cpu"]
if not STATUS.available:
    pytest.skip(STATUS.reason, allow_module_level=True)

import benchmarks.cpu.__main__ as kernels  # noqa: E402
import benchmarks.cpu_model.__main__ as whole_model  # noqa: E402
from benchmarks.bench_step_share import random_tensors  # noqa: E402
from benchmarks.cpu import PROBLEMS, harness, run, select  # noqa: E402
from benchmarks.cpu.machine import Ceiling, Machine  # noqa: E402
from benchmarks.cpu_model import gguf_grok  # noqa: E402


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_problem_runs_and_every_result_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert kernels.main(["--smoke", "--threads", "1", "--json", str(file)]) == 0, capsys.readouterr().out
    found = load(file)
    assert {r.problem for r in found.results} == {p.small().name for p in PROBLEMS.values()}
    assert found.environment.threads == 1
    assert not found.interrupted
    assert {"read", "bf16", "int8", "fp32"} == found.ceilings.keys()
    for result in found.results:
        assert isinstance(result, KernelResult)
        assert any(s.ours for s in result.scores)
        for s in result.scores:
            assert s.status in ("ok", "missing"), (result.problem, s)
            if s.status == "missing":
                assert s.message
                continue
            assert s.seconds and s.low and s.high and s.error is not None and s.share_of_roofline  # noqa: PT018
            assert s.low <= s.seconds <= s.high
            assert s.error < 0.15
            assert len(s.samples) == result.rounds == 2


def test_the_interval_of_a_median() -> None:
    assert harness.interval([3.0]) == (3.0, 3.0)
    assert harness.interval(list(range(100))) == (40, 60)
    assert harness.interval([5, 1, 3, 2, 4]) == (1, 5)


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def run(problem: harness.Problem, *args: Any, **options: Any) -> harness.Result:
        if done:
            raise KeyboardInterrupt
        done.append(problem.name)
        return harness.run(problem, *args, **options)

    monkeypatch.setattr(kernels, "run", run)
    file = tmp_path / "found.json"
    assert kernels.main(["--smoke", "--threads", "1", "--json", str(file), "decode*"]) == 130
    found = load(file)
    assert found.interrupted
    assert [r.problem for r in found.results if isinstance(r, KernelResult)] == done


def test_names_select_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert [p.name for p in select([])] == list(PROBLEMS)
    assert {p.name.split("-")[0] for p in select(["decode*", "moe-*"])} == {"decode", "moe"}
    assert kernels.main(["--list", "attention-*"]) == 0
    assert len(capsys.readouterr().out.split()) == 8
    with pytest.raises(ValueError, match="no problem matches 'nope'"):
        select(["nope"])
    with pytest.raises(ValueError, match="registered twice"):
        harness.register(next(iter(PROBLEMS.values())))


class Scripted(Ceiling):
    """Says the rates it was given, over and over."""

    def __init__(self, *rates: float) -> None:
        super().__init__("read")
        self._script, self._at = rates, -1

    def rate(self) -> float:
        self._at += 1
        self.usual = max(self._script)
        return self._script[self._at % len(self._script)]


@dataclass(frozen=True)
class Given:
    """A problem of these contestants."""

    contestants: tuple[harness.Contestant, ...]
    name: str = "given"
    op: str = "moe"

    def small(self) -> Given:
        return self

    def build(self) -> harness.Setup:
        return harness.Setup(operations=1.0, bytes=1.0, arithmetic="fp32", contestants=self.contestants)


class Counted:
    def __init__(self, value: Tensor | Exception) -> None:
        self.value, self.calls = value, 0

    def __call__(self, i: int) -> Tensor:
        self.calls += 1
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def scored(*values: Tensor | Exception, rates: tuple[float, ...] = (1.0,), **options: Any) -> tuple[Any, list[Counted]]:
    calls = [Counted(value) for value in values]
    contestants = tuple(
        harness.Contestant(name=str(i), call=c, expected=lambda: torch.ones(4), tolerance=1e-3, bytes=1, ours=i == 0)
        for i, c in enumerate(calls)
    )
    machine: Any = SimpleNamespace(binding=lambda *_: (Scripted(*rates), 1.0))
    return run(Given(contestants), machine, **{"seconds": 60.0, "most": 6, **options}), calls


def test_what_is_wrong_or_fails_is_said_and_never_timed() -> None:
    nan = torch.tensor([1.0, 1.0, 1.0, float("nan")])
    result, calls = scored(torch.ones(4), torch.full((4,), 1.01), nan, torch.ones(5), KeyError("no such thing"))
    assert [c.calls for c in calls] == [7, 1, 1, 1, 1]
    assert [s.wrong for s in result.scores] == [False, True, True, True, False]
    assert result.scores[1].error == pytest.approx(0.01, rel=1e-3)
    assert "KeyError: 'no such thing'" in result.scores[4].failed
    assert [s.best_seconds is None for s in result.scores] == [False, True, True, True, True]
    assert result.best_peer == ""


def test_the_best_peer_has_the_ratio_one() -> None:
    result, _ = scored(torch.ones(4), torch.ones(4), torch.ones(4))
    assert result.best_peer in ("1", "2")
    assert result.scores[int(result.best_peer)].times_best_peer == 1.0
    assert result.rounds == 6
    assert result.thrown_away == 0


@pytest.mark.parametrize(
    ("rates", "kept"),
    [((1.0, 1.1), 12), ((1.0, 1.2), 0), ((1.0, 1.0, 0.5, 0.5), 3), ((1.0, 1.0, 1.0, 1.3), 6)],
)
def test_rounds_on_a_busy_machine_are_thrown_away(rates: tuple[float, ...], kept: int) -> None:
    result, _ = scored(torch.ones(4), rates=rates, most=12)
    assert (result.rounds, result.thrown_away) == (kept, 12 - kept)
    assert (result.scores[0].seconds is None) is (result.ceiling_rate is None) is (kept < harness.FEWEST)
    assert result.scores[0].best_seconds is not None
    assert scored(torch.ones(4), rates=rates, pick=False)[0].rounds == 6


def test_the_ceiling_that_takes_longer_binds() -> None:
    machine = Machine(small=True)
    for name, best in {"read": 10.0, "fp32": 100.0, "bf16": 200.0, "int8": 400.0}.items():
        machine.ceilings[name].usual = best
    assert machine.binding(1000.0, 90.0, "fp32")[0].name == "fp32"
    assert machine.binding(1000.0, 90.0, "bf16") == (machine.ceilings["read"], 90.0)
    assert machine.binding(1000.0, 10.0, "int8") == (machine.ceilings["int8"], 1000.0)


def test_the_model_runs_without_llama_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "found.json"
    assert whole_model.main(["--smoke", "--threads", "1", "--json", str(file)]) == 0
    assert "missing (llama.cpp)" in (out := capsys.readouterr().out)
    assert "grok-engine[bench]" in out
    turns = json.loads(file.read_text())["turns"]
    assert list(turns) == ["grok-engine, int8"]
    assert all(value > 0 for value in turns["grok-engine, int8"][0].values())
    with pytest.raises(SystemExit):
        whole_model.main(["--smoke", "--llama", str(tmp_path)])
    assert "found no llama-batched-bench, llama-quantize" in capsys.readouterr().err


def test_gguf_holds_the_same_model(tmp_path: Path) -> None:
    config = whole_model.small_configuration()
    assert len({gguf_grok.gguf_name(spec.name) for spec in layout(config)}) == len(layout(config))
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    gguf_grok.write_gguf(path, config, random_tensors(config))
    reader = gguf.GGUFReader(path)
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GROK]}
    tensors = {t.name: t for t in reader.tensors}
    assert {".".join(p for p in name.split(".")[:-1]) for name in tensors} <= {
        name.format(bid=layer) for name in known for layer in range(config.num_layers)
    }
    for name, (weight, scales) in random_tensors(config):
        stored = tensors[gguf_grok.gguf_name(name)]
        got = gguf.quants.dequantize(stored.data, stored.tensor_type)
        exact = weight.astype(np.float32) * (1 if scales is None else scales.astype(np.float32))
        expected = exact if name == "embed" or exact.ndim == 1 else exact.swapaxes(-1, -2)
        np.testing.assert_allclose(got, expected, rtol=2**-8)


def test_a_folder_with_another_model_is_refused(tmp_path: Path) -> None:
    config: ModelConfig = whole_model.small_configuration()
    whole_model.write_models(tmp_path, config, None, ())
    whole_model.write_models(tmp_path, config, None, ())
    with pytest.raises(ValueError, match="holds another model"):
        whole_model.write_models(tmp_path, replace(config, num_layers=3), None, ())
