"""The rules of the kernels' harness, on contestants that do as they are told. No time is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grok_bench.kernels import contestant, harness
from grok_bench.kernels.case import Case, Plain
from grok_bench.kernels.contestant import Contestant
from grok_bench.kernels.device import Ceiling, Device
from grok_bench.kernels.entrant import Dropped, Entrant, Local
from grok_bench.kernels.harness import Lane
from grok_bench.schema import GpuState, KernelResult, Score, load
from grok_bench.spread import interval
from grok_engine.cli import main

WORK = KernelResult(
    problem="rms_norm/grok-1/decode/t1", op="rms_norm", parameters={}, operations=1, bytes=1, arithmetic="fp32",
    tolerance=0.01,
)  # fmt: skip


class Scripted(Ceiling):
    """Says the rates it was given, over and over."""

    def __init__(self, *rates: float) -> None:
        self._script, self._at = rates, -1
        super().__init__(lambda: 0.0)
        self._at = -1

    def rate(self) -> float:
        self._at += 1
        self.usual = max(self._script)
        return self._script[self._at % len(self._script)]


class Counted:
    """A contestant's call: gives a value, or raises it."""

    def __init__(self, value: Any) -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> Any:
        self.calls += 1
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def run(
    *values: Any,
    rates: tuple[float, ...] = (1.0,),
    enter: Callable[[Contestant, Case, Device], Entrant] | None = None,
    ours: tuple[int, ...] = (0,),
    bind: Callable[[Counted], Any] = lambda call: call,
    device: Device | None = None,
    **limits: Any,
) -> tuple[KernelResult, list[Counted]]:
    """The result of contestants with these values where ones are right; "0" is ours."""
    calls = [Counted(value) for value in values]
    inputs = [Plain(()) for _ in range(3)]
    case = Case(
        inputs=inputs, expected=lambda i: torch.ones(4), operations=1, bytes=1, arithmetic="fp32",
        renew=lambda inputs: None,
    )  # fmt: skip
    device = device or Device(small=True)
    device.binding = lambda *args: (Scripted(*rates), 1.0)  # type: ignore[method-assign]
    contestants = [
        Contestant(name=str(n), op="rms_norm", bind=lambda i, call=call: bind(call), ours=n in ours)  # type: ignore[misc]
        for n, call in enumerate(calls)
    ]

    def local(c: Contestant) -> Entrant:
        return (enter or (lambda c, case, device: Local(c, case, device, 5.0)))(c, case, device)

    lanes = [Lane(Score(contestant=c.name, ours=c.ours), partial(local, c)) for c in contestants]
    return harness.run(WORK, lanes, device, harness.Limits(**{"seconds": 60.0, "rounds": 6, **limits})), calls


ONES = torch.ones(4)


def test_the_interval_of_a_median() -> None:
    assert interval([3.0]) == (3.0, 3.0)
    assert interval(list(range(100))) == (40, 60)
    assert interval([5, 1, 3, 2, 4]) == (1, 5)


def test_what_is_wrong_or_fails_is_said_and_never_timed() -> None:
    nan = torch.tensor([1.0, 1.0, 1.0, float("nan")])
    result, calls = run(ONES, torch.full((4,), 1.02), nan, torch.ones(5), KeyError("no such thing"))
    assert [c.calls for c in calls] == [
        1 + 3 + 6 + 1,
        1,
        1,
        1,
        1,
    ]  # checked, warmed with each input, timed, checked again
    assert [s.status for s in result.scores] == ["ok", "wrong", "wrong", "wrong", "failed"]
    assert result.scores[1].error == pytest.approx(0.02, rel=1e-3)
    assert "KeyError: 'no such thing'" in result.scores[4].message
    assert [s.seconds is None for s in result.scores] == [False, True, True, True, True]
    assert result.best_peer is None


def test_a_result_may_be_taken_apart_after_the_time() -> None:
    result, _ = run(lambda: ONES, lambda: ONES * 2)
    assert [s.status for s in result.scores] == ["ok", "wrong"]


def test_the_best_peer_has_the_ratio_one() -> None:
    result, _ = run(ONES, ONES, ONES)
    assert result.best_peer in ("1", "2")
    assert result.scores[int(result.best_peer)].speedup == 1.0
    assert (result.rounds, result.thrown_away) == (6, 0)


@pytest.mark.parametrize(
    ("rates", "kept"),
    [((1.0, 1.1), 12), ((1.0, 1.2), 0), ((1.0, 1.0, 0.5, 0.5), 3), ((1.0, 1.0, 1.0, 1.3), 6)],
)
def test_rounds_on_a_busy_machine_are_thrown_away(rates: tuple[float, ...], kept: int) -> None:
    result, _ = run(ONES, rates=rates, rounds=12)
    assert (result.rounds, result.thrown_away) == (kept, 12 - kept)
    (score,) = result.scores
    assert (score.seconds is None) is (score.status == "noisy") is (kept < harness.FEWEST)
    if score.seconds is None:
        assert score.message.startswith("too few quiet rounds; the best of all rounds took ")
    assert run(ONES, rates=rates, pick=False)[0].rounds == 6


def test_narrow_intervals_end_the_rounds() -> None:
    class Steady(Local):
        def time(self, turn: int) -> float:
            return 1.0

    result, _ = run(ONES, ONES, rounds=200, enter=lambda c, case, device: Steady(c, case, device, 5.0))
    assert result.rounds == harness.ENOUGH


def test_the_time_limit_ends_the_rounds() -> None:
    result, _ = run(ONES, rounds=10_000, seconds=0.05)
    assert harness.FEWEST <= result.rounds < 10_000


def test_who_has_no_kernel_for_a_problem_is_missing_and_has_not_failed() -> None:
    result, _ = run(ONES, NotImplementedError("bfloat16 is not taken"))
    assert [(s.status, s.message) for s in result.scores] == [("ok", ""), ("missing", "bfloat16 is not taken")]


@pytest.mark.parametrize(("said", "status"), [("timeout", "timeout"), ("failed", "failed"), ("missing", "failed")])
def test_who_drops_out_of_the_rounds_does_not_stop_the_others(said: str, status: str) -> None:
    class Breaks(Local):
        def time(self, turn: int) -> float:
            if self.contestant.name == "1" and turn > 8:
                raise Dropped(said, "gone")
            return super().time(turn)

    result, _ = run(ONES, ONES, ONES, enter=lambda c, case, device: Breaks(c, case, device, 5.0))
    assert [s.status for s in result.scores] == ["ok", status, "ok"]
    assert result.scores[1].seconds is None
    assert result.best_peer == "2"
    assert len(result.scores[0].samples) == len(result.scores[2].samples) == result.rounds == 6


def test_a_call_that_hangs_is_stopped() -> None:
    class Hangs:
        def __call__(self) -> Tensor:
            try:
                while True:
                    pass
            except Exception as error:  # as a compiler does
                raise KeyError("wrapped") from error

    hangs = Contestant(name="1", op="rms_norm", bind=lambda i: Hangs())
    result, _ = run(ONES, ONES, enter=lambda c, case, device: Local(hangs if c.name == "1" else c, case, device, 0.2))
    assert [s.status for s in result.scores] == ["ok", "timeout"]
    assert "more than" in result.scores[1].message


def test_ctrl_c_gives_what_the_rounds_gave() -> None:
    class Stopped(Local):
        def time(self, turn: int) -> float:
            if turn == 5:
                raise KeyboardInterrupt
            return super().time(turn)

    with pytest.raises(harness.Interrupted) as stopped:
        run(ONES, rounds=100, pick=False, enter=lambda c, case, device: Stopped(c, case, device, 5.0))
    assert stopped.value.result.rounds == 5
    assert stopped.value.result.scores[0].seconds


class Machine(Device):
    """A made-up machine: a clock that only work moves, and a cache that a flush empties in 5 ms."""

    def __init__(self) -> None:
        self.now, self.cached = 0.0, set[str]()
        super().__init__(small=True, probed=False)

    def seconds(self, call: Callable[[], Any]) -> float:
        start = self.now
        call()
        return self.now - start

    def flush(self) -> None:
        self.now += 5e-3
        self.cached.clear()


def test_the_flush_is_outside_of_the_time_and_empties_the_cache() -> None:
    """A kernel that does nothing takes no part of the flush's time; one whose data fill the cache finds it cold."""
    machine = Machine()

    def nothing() -> Tensor:
        machine.now += 1e-7
        return ONES

    def reads() -> Tensor:
        machine.now += 1e-3 if "data" in machine.cached else 4e-3
        machine.cached.add("data")
        return ONES

    result, _ = run(nothing, reads, bind=lambda call: call.value, device=machine)
    assert [s.seconds for s in result.scores] == [1e-7, 4e-3]


def test_what_falls_during_the_rounds_is_told() -> None:
    result, _ = run(ONES, rates=tuple(1.0 - 0.01 * i for i in range(31)), rounds=30, pick=False)
    assert result.warnings == ["the rate of the ceiling fell by 21% during the rounds"]
    assert run(ONES, rounds=30)[0].warnings == []
    state = GpuState(watts=1, most_watts=1, limit_watts=1, clock_mhz=1980, least_clock_mhz=1410, celsius=60,
                     held_back=0, readings=9)  # fmt: skip
    assert state.fell == "the clock fell to 1410 MHz, from 1980 as a rule"
    assert replace(state, least_clock_mhz=1960).fell == ""
    machine = Machine()
    machine.state = lambda *times: state  # type: ignore[method-assign]
    assert run(ONES, device=machine)[0].warnings == [state.fell]


PLUGIN = '''
import os, time
import torch
import grok_bench

@grok_bench.contestant("rms_norm", prepare=True)
def careful(x, weight, eps):
    return lambda: torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight, eps).bfloat16()

@grok_bench.contestant("rms_norm")
def dies(x, weight, eps):
    os._exit(7)

@grok_bench.contestant("rms_norm")
def hangs(x, weight, eps):
    time.sleep(1000)
'''  # fmt: skip


def test_in_a_process_of_its_own_it_may_die_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestant, "_contestants", {})
    plugin, file = tmp_path / "plugin.py", tmp_path / "found.json"
    plugin.write_text(PLUGIN)
    options = [
        "--smoke",
        "--subprocess",
        "--threads",
        "1",
        "--limit",
        "1",
        "--plugin",
        str(plugin),
        "--json",
        str(file),
    ]
    names = [option for name in ("careful", "dies", "hangs") for option in ("--contestant", name)]
    assert main(["bench", "kernels", "rms_norm/grok-1/decode/t4", *options, *names]) == 1  # the subject
    (result,) = (r for r in load(file).results if isinstance(r, KernelResult))
    assert {s.contestant: s.status for s in result.scores} == {"careful": "ok", "dies": "failed", "hangs": "timeout"}
    assert "status 7" in next(s.message for s in result.scores if s.contestant == "dies")
