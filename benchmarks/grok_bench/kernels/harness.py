"""Contestants at one problem, in turns with a probe of the machine, and what comes of the times.

A round is one call of every contestant, in an order that moves on, between two probes. A round whose probes differ by
more than NOISE is thrown away, and so is one whose probes are under BUSY of the usual: something else had the cores.
Of the others the medians of ratios within a round are given, since what else the machine does changes from second to
second. A contestant's result is compared with fp32 before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, isfinite
from statistics import median

import torch

from ..report.units import duration
from ..schema import KernelResult, Score
from .case import Case
from .contestant import Contestant
from .device import Ceiling, Device
from .entrant import Entrant, Failed, Refused, TooLong
from .problems import Problem

NOISE, BUSY = 1.15, 0.6
FEWEST, PATIENCE = 5, 5  # quiet rounds that a result takes, and so many times the seconds to wait for them
NARROW, ENOUGH = 0.02, 15  # an interval so wide, of its median, after so many rounds ends them


@dataclass(frozen=True)
class Limits:
    """Seconds of rounds a problem, rounds at most, and seconds a call; without `pick` no round is thrown away."""

    seconds: float = 4.0
    rounds: int = 200
    call: float = 60.0
    pick: bool = True


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during the rounds of a problem, with what they gave so far."""

    def __init__(self, result: KernelResult) -> None:
        super().__init__()
        self.result = result


@dataclass
class _Lane:
    """One contestant's way through a problem."""

    contestant: Contestant
    score: Score
    entrant: Entrant | None = None
    samples: list[float] = field(default_factory=list)  # of the quiet rounds
    best: float | None = None  # of all rounds, quiet or not

    def out(self, error: Exception, limit: float) -> None:
        """It takes no further part."""
        if isinstance(error, TooLong):
            self.score = replace(self.score, status="timeout", message=f"more than {limit:g} s a call")
        else:
            self.score = replace(self.score, status="failed", message=str(error))
        self.close()

    def close(self) -> None:
        if self.entrant is not None:
            self.entrant.close()
            self.entrant = None


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Of the median, 95%: the order statistics that a binomial count of samples below it falls between."""
    ordered, n = sorted(samples), len(samples)
    reach = 0.98 * n**0.5  # 1.96 standard deviations, each √n / 2
    return ordered[max(0, floor(n / 2 - reach))], ordered[min(n - 1, ceil(n / 2 + reach))]


@torch.inference_mode()
def run(
    problem: Problem,
    case: Case,
    contestants: Sequence[Contestant],
    device: Device,
    enter: Callable[[Contestant], Entrant],
    limits: Limits,
) -> KernelResult:
    """Checks, then times the contestants. Interrupted on Ctrl-C once something has been measured."""
    lanes = [_checked(c, case, device, enter, limits) for c in contestants]
    ceiling, work = device.binding(case.operations, case.bytes, case.arithmetic)
    rates: list[float] = []
    thrown_away, interrupted, began = 0, False, time.perf_counter()
    try:
        thrown_away = _rounds([lane for lane in lanes if lane.entrant], ceiling, rates, limits)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for lane in lanes:
            lane.close()
    ended = time.perf_counter()
    scores, best_peer = _scores(lanes, case, work, rates, limits)
    result = KernelResult(
        problem=problem.name,
        op=problem.op,
        family=problem.model,
        parameters=dict(problem.parameters),
        operations=case.operations,
        bytes=case.bytes,
        arithmetic=case.arithmetic if case.arithmetic in device.ceilings else "bf16",
        floor_seconds=work / (median(rates) if rates else ceiling.usual),
        rounds=len(rates),
        thrown_away=thrown_away,
        best_peer=best_peer,
        scores=scores,
        gpu=device.state(began, ended),
    )
    if interrupted:
        raise Interrupted(result)
    return result


def _checked(
    c: Contestant, case: Case, device: Device, enter: Callable[[Contestant], Entrant], limits: Limits
) -> _Lane:
    tolerance = case.tolerance if c.tolerance is None else c.tolerance
    lane = _Lane(c, Score(contestant=c.name, ours=c.ours, status="ok", tolerance=tolerance))
    why = c.missing() or _no_room(c, case, device)
    if why:
        lane.score = replace(lane.score, status="missing", message=why)
        return lane
    try:
        lane.entrant = enter(c)
        found = lane.entrant.check()
    except Refused as error:
        lane.score = replace(lane.score, status="missing", message=str(error))
        lane.close()
        return lane
    except (TooLong, Failed) as error:
        lane.out(error, limits.call)
        return lane
    lane.score = replace(lane.score, error=found if isfinite(found) else None)
    if not found <= tolerance:
        lane.score = replace(lane.score, status="wrong")
        lane.close()
    return lane


def _no_room(c: Contestant, case: Case, device: Device) -> str:
    need, free = case.stored * (c.weight_bytes or 0.0), device.free()
    if free is None or need <= free:
        return ""
    return f"its own copy needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are available on {device.name}"


def _rounds(lanes: list[_Lane], ceiling: Ceiling, rates: list[float], limits: Limits) -> int:
    """Fills the lanes' samples, and `rates` with the ceiling's of the same rounds; returns the rounds thrown away."""
    thrown_away, began, before = 0, time.perf_counter(), ceiling.rate()
    while lanes and len(rates) + thrown_away < limits.rounds:
        spent = time.perf_counter() - began
        if spent > limits.seconds * (1 if len(rates) >= FEWEST else PATIENCE):
            break
        if len(rates) >= ENOUGH and all(_narrow(lane.samples) for lane in lanes):
            break
        taken = _round(lanes, len(rates) + thrown_away, limits.call)
        after = ceiling.rate()
        low, high = sorted((before, after))
        if len(taken) < len(lanes):  # someone is out
            lanes = [lane for lane in lanes if lane.entrant]
        elif limits.pick and (high > NOISE * low or low < BUSY * ceiling.usual):
            thrown_away += 1
        else:
            rates.append((before + after) / 2)
            for lane, seconds in zip(lanes, taken, strict=True):
                lane.samples.append(seconds)
        before = after
    return thrown_away


def _round(lanes: list[_Lane], number: int, limit: float) -> list[float]:
    """The seconds of each lane's call; fewer than lanes where one is out.

    No two calls in a row take the same inputs; a lane's take them all in the end, since the stride is odd.
    """
    stride = len(lanes) | 1
    taken = dict.fromkeys(range(len(lanes)), 0.0)
    for j in range(len(lanes)):
        which = (number + j) % len(lanes)
        lane = lanes[which]
        assert lane.entrant is not None
        try:
            taken[which] = lane.entrant.time(number * stride + which)
        except (TooLong, Failed) as error:
            lane.out(error, limit)
            del taken[which]
            continue
        lane.best = taken[which] if lane.best is None else min(lane.best, taken[which])
    return list(taken.values())


def _narrow(samples: Sequence[float]) -> bool:
    low, high = interval(samples)
    return high - low <= NARROW * median(samples)


def _scores(
    lanes: list[_Lane], case: Case, work: float, rates: list[float], limits: Limits
) -> tuple[list[Score], str | None]:
    few = len(rates) < (FEWEST if limits.pick else 1)
    timed = [lane for lane in lanes if lane.score.status == "ok"]
    if few:
        for lane in timed:
            best = "" if lane.best is None else f"; the best of all rounds took {duration(lane.best)}"
            lane.score = replace(lane.score, status="timeout", message=f"too few quiet rounds{best}")
        return [lane.score for lane in lanes], None
    peers = [lane for lane in timed if not lane.contestant.ours]
    best_peer = min(peers, key=lambda lane: median(lane.samples), default=None)
    for lane in timed:
        middle = median(lane.samples)
        low, high = interval(lane.samples)
        lane.score = replace(
            lane.score,
            seconds=middle,
            low=low,
            high=high,
            samples=[float(f"{x:.4g}") for x in lane.samples],  # what a clock tells apart
            bytes_per_second=case.bytes_of(lane.contestant.weight_bytes if case.weights else None) / middle,
            operations_per_second=case.operations / middle,
            share_of_roofline=median(work / rate / t for rate, t in zip(rates, lane.samples, strict=True)),
        )
        if best_peer is not None:
            ratios = (b / t for b, t in zip(best_peer.samples, lane.samples, strict=True))
            lane.score = replace(lane.score, times_best_peer=median(ratios))
    return [lane.score for lane in lanes], best_peer.contestant.name if best_peer else None
