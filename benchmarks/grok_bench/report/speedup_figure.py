"""Bars: how many times as fast as the best peer."""

from __future__ import annotations

from math import log10

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..schema import KernelResult, ResultFile, Score
from .rows import best_of_ours, best_peer, caption, kernel_results
from .style import WIDTH, Theme, canvas, log_axis, place, short
from .units import digits

ROW, LEFT, RIGHT, NUMBER = 0.2, 2.45, 2.05, 0.5  # inches: of a bar, of the names at both sides, of a bar's number
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def speedup(file: ResultFile, theme: Theme) -> Figure:
    """A row a problem, in the order of the file, with the best of ours where there are several."""
    rows = [(r, best_of_ours(r)) for r in kernel_results(file)]
    starts = [i == 0 or rows[i - 1][0].op != r.op for i, (r, _) in enumerate(rows)]
    headed = [start and r.problem.startswith(f"{r.op}/") for start, (r, _) in zip(starts, rows, strict=True)]
    high = ROW * (len(rows) + 0.5 * (sum(starts) - 1) + sum(headed))
    figure = canvas(
        theme,
        WIDTH,
        high + 1.35,
        "Speed against the best peer",
        "the peer's time over ours, in the same rounds: right of 1 ours is faster; whiskers: 95% intervals",
        caption(file),
    )
    axes = place(figure, LEFT, 0.7, WIDTH - LEFT - RIGHT, high)
    axes.set(xscale="log", xlabel="× the best peer (log scale)", ylim=(high / ROW - 0.25, -0.75), yticks=[])
    raced = [ratio_with_interval(r, s) for r, s in rows if s and s.times_best_peer]
    _limits(axes, [value for values in raced for value in values if value])
    axes.spines["left"].set_visible(False)
    axes.axvline(1, color=theme.ink, linewidth=0.9)
    y, sides = 0.0, axes.get_yaxis_transform()
    for i, (result, ours) in enumerate(rows):
        if i and starts[i]:
            y += 0.5
        if headed[i]:  # the op stands once above its problems, whose names begin with it
            axes.text(-0.02, y, result.op, ha="right", va="center", size=7, weight="bold", transform=sides)
            y += 1
        name = result.problem.removeprefix(f"{result.op}/")
        axes.text(-0.02, y, short(name, 40), ha="right", va="center", size=7, transform=sides)
        if ours and ours.times_best_peer:
            _bar(axes, y, result, ours, theme)
            told, colour = f"vs {short(result.best_peer or '', 34)}", theme.quiet
        else:
            told, colour = _why_not(result, ours), theme.ink
        axes.text(1.02, y, told, va="center", size=6.5, color=colour, transform=sides)
        y += 1
    return figure


def _limits(axes: Axes, ratios: list[float]) -> None:
    """With room for the number at the end of each bar; ticks outward from 1, none on another."""
    low, high = min([0.9, *ratios]), max([1.1, *ratios])
    width = WIDTH - LEFT - RIGHT
    pad = log10(high / low) * NUMBER / (width - 2 * NUMBER)
    axes.set_xlim(low / 10**pad, high * 10**pad)
    log_axis(axes.xaxis, "", [1, *(t for t in TICKS if t > 1 and t < axes.get_xlim()[1])], room=0.3)
    above = list(axes.get_xticks())
    log_axis(axes.xaxis, "", [1, *(t for t in reversed(TICKS) if 1 > t > axes.get_xlim()[0])], room=0.3)
    axes.set_xticks(sorted({*above, *axes.get_xticks()}))


def _bar(axes: Axes, y: float, result: KernelResult, ours: Score, theme: Theme) -> None:
    ratio, low, high = ratio_with_interval(result, ours)
    faster = ratio >= 1
    axes.barh(
        y,
        ratio - 1,
        left=1,
        height=0.68,
        facecolor=theme.ours if faster else theme.paper,
        edgecolor=theme.ours if faster else theme.peers[0],
        hatch=None if faster else "/////",
        linewidth=0.8,
    )
    ends = [1.0, ratio]
    if low and high:
        axes.plot([low, high], [y, y], color=theme.ink, linewidth=0.9, marker="|", markersize=4)
        ends += [low, high]
    axes.annotate(
        f"{ratio:.2f}×" if ratio < 10 else f"{digits(ratio)}×",
        (max(ends) if faster else min(ends), y),
        xytext=(4 if faster else -4, 0),
        textcoords="offset points",
        va="center",
        ha="left" if faster else "right",
        size=6.5,
    )


def ratio_with_interval(result: KernelResult, ours: Score) -> tuple[float, float | None, float | None]:
    """× best peer, with 95% of its bootstrap over rounds where both have the same rounds."""
    peer, ratio = best_peer(result), ours.times_best_peer or 0.0
    if not peer or not ours.samples or len(peer.samples) != len(ours.samples):
        return ratio, None, None
    rounds = np.asarray(peer.samples) / np.asarray(ours.samples)
    drawn = np.random.default_rng(0).choice(rounds, (1000, len(rounds)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return ratio, float(low), float(high)


def _why_not(result: KernelResult, ours: Score | None) -> str:
    if ours:
        return "no peer was timed"
    words = {
        "wrong": "ours is WRONG",
        "failed": "ours FAILED",
        "timeout": "ours TIMED OUT",
        "missing": "ours is missing",
    }
    return next((words[s.status] for s in result.scores if s.ours and s.status in words), "ours was not timed")
