"""Figures of kernels: the roofline, the speed-up over the best peer, time against tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ..schema import ResultFile
from . import style
from .rows import best_of_ours, best_peer, caption, kernel_results, memory_ceiling
from .speedup_figure import speedup
from .sweeps import sweeps
from .time_figure import against
from .units import amount

Point = tuple[float, float, float | None]  # intensity, our rate, the best peer's
NAMED = 16  # lines of the roofline that have names; of more than that the ops have
Parts = tuple[str, str, Callable[[style.Theme], Figure]]


def all_of(file: ResultFile) -> Iterator[Parts]:
    results = kernel_results(file)
    timed = [r for r in results if any(s.seconds for s in r.scores)]
    if not timed:
        return
    if memory_ceiling(file) and any(r.arithmetic in file.ceilings and best_of_ours(r) for r in timed):
        yield "roofline", "Roofline", partial(roofline, file)
    if any(r.best_peer for r in timed):
        yield "speedup", "Speed against the best peer", partial(speedup, file)
    lines = [s for s in sweeps(timed) if len(s.xs) > 1]
    for op in dict.fromkeys(s.op for s in lines):
        own = [s for s in lines if s.op == op]
        yield f"time-{op}", f"{op}: time against {own[0].over}", partial(against, file, own)


def roofline(file: ResultFile, theme: style.Theme) -> Figure:
    results = [r for r in kernel_results(file) if r.arithmetic in file.ceilings and best_of_ours(r)]
    figure = style.canvas(
        theme, style.WIDTH, 5.2, "Roofline",
        "filled: ours; hollow: the best peer at the same problem; lines: ceilings measured on this machine",
        caption(file),
    )  # fmt: skip
    axes = style.place(figure, 1.05, 0.8, style.WIDTH - 2.35, 3.7)
    points: dict[str, Point] = {}
    for r in results:
        ours, peer = best_of_ours(r), best_peer(r)
        assert ours is not None
        assert ours.seconds
        rate = r.operations / peer.seconds if peer and peer.seconds else None
        points[r.problem] = r.operations / r.bytes, r.operations / ours.seconds, rate
    memory = memory_ceiling(file)
    assert memory is not None
    read = file.ceilings[memory].rate
    flat = {name: file.ceilings[name].rate for name in dict.fromkeys(r.arithmetic for r in results)}
    xs, ys = [p[0] for p in points.values()], [y for p in points.values() for y in p[1:] if y]
    ridge = max(flat.values()) / read
    left, right = min(xs) / 2.5, max(max(xs) * 2, ridge * 4)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(ys) / 2.5, max(flat.values()) * 2))
    axes.set(xlabel="operations per byte that must move", ylabel="operations per second")
    style.log_axis(axes.xaxis, "")
    style.log_axis(axes.yaxis, "FLOP/s")
    taken = _roofs(axes, memory, read, flat, theme)
    drawn = sweeps(results)
    labels: dict[str, list[Point]] = {}
    ops = list(dict.fromkeys(r.op for r in results))
    for sweep in drawn:
        own = [points[r.problem] for r in sweep.results]
        which = ops.index(sweep.op)
        colour = (theme.ours, *theme.peers)[which % 7]
        marker = ("o", *style.MARKERS)[(which + which // 7) % 7]
        for x, y, other in own:
            if other:
                axes.plot([x, x], [y, other], color=theme.quiet, linewidth=0.6, zorder=2)
                axes.plot(x, other, marker, markersize=3.6, mfc=theme.paper, mec=colour, mew=0.8, zorder=3)
        line = sorted(own)
        axes.plot([p[0] for p in line], [p[1] for p in line], color=colour, linewidth=0.8, zorder=2)
        taken += style.covered(axes, [p[0] for p in line], [p[1] for p in line])
        axes.plot(
            [p[0] for p in line], [p[1] for p in line], marker, color=colour, markersize=6, mec=theme.paper, mew=0.6,
            zorder=4,
        )  # fmt: skip
        of = f" ({sweep.xs[0]:,g}–{sweep.xs[-1]:,g} {sweep.over})" if len(sweep.xs) > 1 else ""
        name = style.short(sweep.name, 34) + of if len(drawn) <= NAMED else sweep.op
        labels.setdefault(name, []).extend(own)
    for x, y, other in points.values():
        for value, half in ((y, 5), (other, 3)):
            if value:
                px, py = axes.transData.transform((x, value))
                taken.append(Bbox.from_extents(px - half, py - half, px + half, py + half))
    near = [(_apart(own, [p for p in points.values() if p not in own]), name) for name, own in labels.items()]
    style.near_labels(axes, sorted(near, key=lambda label: len(label[0])), taken, theme, 6.5)
    return figure


def _apart(own: list[Point], others: list[Point]) -> list[tuple[float, float]]:
    """The half of the points that lies farthest from any other: a name there can mean no other line."""

    def distance(p: Point) -> float:
        return min((abs(np.log(p[0] / q[0])) + abs(np.log(p[1] / q[1])) for q in others), default=0.0)

    return [(x, y) for x, y, _ in sorted(own, key=distance, reverse=True)[: (len(own) + 1) // 2]]


def _roofs(axes: Axes, memory: str, read: float, flat: dict[str, float], theme: style.Theme) -> list[Bbox]:
    """The ceilings with their names; what the names cover."""
    (left, right), bottom = axes.get_xlim(), axes.get_ylim()[0]
    axes.plot([left, max(flat.values()) / read], [left * read, max(flat.values())], color=theme.ink, linewidth=1.2)
    taken = style.covered(axes, [left, max(flat.values()) / read], [left * read, max(flat.values())])
    for rate in flat.values():
        axes.plot([rate / read, right], [rate, rate], color=theme.ink, linewidth=1.2)
        taken += style.covered(axes, [rate / read, right], [rate, rate])
    names = [(right, rate, f"{name} {amount(rate, 'FLOP/s')}", theme.ink) for name, rate in flat.items()]
    style.end_labels(axes, names, theme)
    x = max(left, bottom / read) * 1.25
    start, end = axes.transData.transform([(x, x * read), (x * 2, x * 2 * read)])
    angle = float(np.degrees(np.arctan2(end[1] - start[1], end[0] - start[0])))
    slope = axes.annotate(
        f"{memory} {amount(read, 'B/s')}", (x, x * read), xytext=(-3, 3), textcoords="offset points", rotation=angle,
        rotation_mode="anchor", size=7, color=theme.ink,
    )  # fmt: skip
    taken.append(slope.get_window_extent())
    return taken
