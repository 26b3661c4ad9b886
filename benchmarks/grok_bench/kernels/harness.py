"""The one way in which the suite times: contestants in interleaved rounds, between probes of the machine.

Each contestant's result is compared with the truth before it is timed, and again afterwards, with inputs that were
changed in place: what remembers a result by the address of its inputs is wrong then. A round is one call of every
contestant, in an order that rotates, between two probes of the ceiling that bounds the problem. A round is thrown away
if its probes differ by more than NOISE or fall under BUSY of the usual: something else had the cores. What is reported
of the others are medians, of ratios within a round, since a shared machine changes from second to second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from statistics import median
from typing import Any

import torch

from ..report.units import duration
from ..schema import KernelResult, Score
from ..spread import interval, raced, significant
from .device import Ceiling, Device
from .entrant import Dropped, Entrant

NOISE, BUSY = 1.15, 0.6
TICK = 1e-9  # seconds: a clock may not tell the end of an empty call from its start
FALLEN = 0.9  # of the ceiling's rate at first: what it falls to without a warning
FEWEST, PATIENCE = 5, 5  # least quiet rounds of a result, and the multiple of the seconds to wait for them
NARROW, ENOUGH = 0.02, 15  # rounds end when every interval is this narrow (of its median), after at least so many


@dataclass(frozen=True)
class Limits:
    """Seconds of rounds a problem, most rounds, seconds of a call; without `pick` no round is thrown away.

    `end`: the time of `time.perf_counter()` after which no round begins, whatever is left to measure.
    """

    seconds: float = 4.0
    rounds: int = 200
    call: float = 60.0
    pick: bool = True
    end: float = inf


@dataclass
class Lane:
    """One contestant's way through a problem. A `score` that is "missing" takes no part."""

    score: Score
    enter: Callable[[], Entrant]
    entrant: Entrant | None = None
    samples: list[float] = field(default_factory=list)  # of the quiet rounds
    best: float | None = None  # of all rounds

    def note(self, **values: Any) -> None:
        """Change members of the score."""
        self.score = replace(self.score, **values)

    def drop(self, status: str, message: str = "") -> None:
        self.note(status=status, message=message)
        if self.entrant is not None:
            self.entrant.close()
            self.entrant = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during the rounds of a problem, with what they gave so far."""

    def __init__(self, result: KernelResult) -> None:
        super().__init__()
        self.result = result


@torch.inference_mode()
def run(work: KernelResult, lanes: Sequence[Lane], device: Device, limits: Limits) -> KernelResult:
    """Check the contestants, then time them. `work`: the problem, without rounds and scores.

    Interrupted on Ctrl-C once something has been measured.
    """
    for lane in lanes:
        if lane.score.status != "missing":
            _check(lane)
    ceiling, amount = device.binding(work.operations, work.bytes, work.arithmetic)
    rates: list[float] = []
    thrown_away, interrupted, began = 0, False, time.perf_counter()
    try:
        thrown_away = _rounds([lane for lane in lanes if lane.entrant], ceiling, rates, limits)
    except KeyboardInterrupt:
        interrupted = True
    gpu = device.state(began, time.perf_counter())
    for lane in lanes:
        if lane.entrant:
            _check(lane, again=True)
        if lane.entrant:
            lane.entrant.close()
    _score(lanes, amount, rates, limits)
    scores, best_peer = raced([lane.score for lane in lanes])
    result = replace(
        work,
        arithmetic=work.arithmetic if work.arithmetic in device.ceilings else "bf16",
        floor_seconds=significant(amount / (median(rates) if rates else ceiling.usual)),
        rounds=len(rates),
        thrown_away=thrown_away,
        best_peer=best_peer,
        scores=scores,
        gpu=gpu,
        warnings=_fell(rates) + ([gpu.fell] if gpu and gpu.fell else []),
    )
    if interrupted:
        raise Interrupted(result)
    return result


def _check(lane: Lane, again: bool = False) -> None:
    try:
        lane.entrant = lane.entrant or lane.enter()
        error = None if (found := lane.entrant.check(again)) is None or again else found
    except Dropped as dropped:
        status, message, *errors = dropped.args
        if again and not errors:
            message, status = f"after the timing, with other inputs: {message}", _after(status)
        lane.drop(status, message)
        error = errors[0] if errors else None
    if error is not None:
        lane.note(error=significant(error) if isfinite(error) else None)


def _after(status: str) -> str:
    """The status of a contestant that drops out after its first call: it has the kernel."""
    return "failed" if status == "missing" else status


def _fell(rates: Sequence[float]) -> list[str]:
    """A warning if the ceiling's rate fell during the rounds: clocks did, or something else took the machine."""
    third = len(rates) // 3
    if not third or (last := median(rates[-third:])) >= FALLEN * (first := median(rates[:third])):
        return []
    return [f"the rate of the ceiling fell by {1 - last / first:.0%} during the rounds"]


def _rounds(lanes: list[Lane], ceiling: Ceiling, rates: list[float], limits: Limits) -> int:
    """Fill the lanes' samples, and `rates` with the ceiling's in the same rounds; return how many were thrown away."""
    thrown_away, began, before = 0, time.perf_counter(), ceiling.rate()
    while lanes and len(rates) + thrown_away < limits.rounds and time.perf_counter() < limits.end:
        spent = time.perf_counter() - began
        if spent > limits.seconds * (1 if len(rates) >= FEWEST else PATIENCE):
            break
        if len(rates) >= ENOUGH and all(_narrow(lane.samples) for lane in lanes):
            break
        taken = _round(lanes, len(rates) + thrown_away)
        after = ceiling.rate()
        low, high = sorted((before, after))
        if len(taken) < len(lanes):  # a contestant dropped out
            lanes = [lane for lane in lanes if lane.entrant]
        elif limits.pick and (high > NOISE * low or low < BUSY * ceiling.usual):
            thrown_away += 1
        else:
            rates.append((before + after) / 2)
            for lane, seconds in zip(lanes, taken, strict=True):
                lane.samples.append(seconds)
        before = after
    return thrown_away


def _round(lanes: list[Lane], number: int) -> list[float]:
    """The seconds of each lane's call; fewer than lanes where one dropped out.

    No two calls in a row take the same inputs; a lane takes all of them in the end, since the stride is odd.
    """
    stride = len(lanes) | 1
    taken = dict.fromkeys(range(len(lanes)), 0.0)
    for j in range(len(lanes)):
        which = (number + j) % len(lanes)
        lane = lanes[which]
        assert lane.entrant is not None
        try:
            taken[which] = max(lane.entrant.time(number * stride + which), TICK)
        except Dropped as dropped:
            status, message = dropped.args
            lane.drop(_after(status), message)
            del taken[which]
            continue
        lane.best = taken[which] if lane.best is None else min(lane.best, taken[which])
    return list(taken.values())


def _narrow(samples: Sequence[float]) -> bool:
    low, high = interval(samples)
    return high - low <= NARROW * median(samples)


def _score(lanes: Sequence[Lane], amount: float, rates: list[float], limits: Limits) -> None:
    """Fill the scores of the timed lanes. `amount`: bytes or operations."""
    for lane in (lane for lane in lanes if lane.score.status == "ok"):
        if len(rates) < (FEWEST if limits.pick else 1):
            best = "" if lane.best is None else f"; the best of all rounds took {duration(lane.best)}"
            lane.note(status="noisy", message=f"too few quiet rounds{best}")
            continue
        low, high = interval(lane.samples)
        lane.note(
            seconds=significant(median(lane.samples)),
            low=significant(low),
            high=significant(high),
            samples=list(map(significant, lane.samples)),
            roofline=significant(median(amount / r / t for r, t in zip(rates, lane.samples, strict=True))),
        )
