"""Time against tokens, or whatever number the problems of an op differ in."""

from __future__ import annotations

from math import ceil
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..schema import ResultFile
from . import style
from .rows import caption
from .sweeps import Sweep

LEFT, RIGHT, BELOW = 0.62, 1.75, 0.75  # inches around each panel: its ticks, its names, its axis and the next title
NAME = 27  # characters of a contestant's
Line = list[tuple[float, float]]


def against(file: ResultFile, sweeps: list[Sweep], theme: style.Theme) -> Figure:
    """A panel a sweep, a line a contestant; the floor is dashed. A contestant looks the same in every panel."""
    across = 1 if len(sweeps) == 1 else 2
    down = ceil(len(sweeps) / across)
    width, tall = (style.WIDTH, 2.9) if across == 1 else (8.6, 1.95)
    figure = style.canvas(
        theme,
        width,
        BELOW + down * (tall + BELOW) + 0.1,
        f"{sweeps[0].op}: time against {sweeps[0].over}",
        "medians; thick: ours; dashed with no marks: the floor that this machine's ceilings set",
        caption(file),
    )
    looks = _looks(sweeps, theme)
    for i, sweep in enumerate(sweeps):
        left, bottom = (i % across) * width / across + LEFT, BELOW + (down - 1 - i // across) * (tall + BELOW)
        axes = style.place(figure, left, bottom, width / across - LEFT - RIGHT, tall)
        axes.set_title(style.short(sweep.name.removeprefix(f"{sweep.op}/"), 40))
        axes.set(xscale="log", yscale="log", xlabel=sweep.over)
        _panel(axes, sweep, looks, theme)
    return figure


def _looks(sweeps: list[Sweep], theme: style.Theme) -> dict[str, dict[str, Any]]:
    scores = [s for sweep in sweeps for r in sweep.results for s in r.scores if s.seconds]
    ours = {s.contestant for s in scores if s.ours}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(s.contestant for s in scores):
        if name in ours:
            k = sum(n in ours for n in found)
            found[name] = {"color": theme.ours, "linewidth": 2.2, "zorder": 4, "marker": ("o", "h", "*")[k % 3]}
            found[name] |= {"linestyle": "-" if k == 0 else style.DASHES[(k - 1) % 6]}
        else:
            k = sum(n not in ours for n in found)
            found[name] = {
                "color": theme.peers[k % 6],
                "marker": style.MARKERS[k % 6],
                "linestyle": style.DASHES[(k + k // 6) % 6],
            }
            found[name] |= {"mfc": theme.paper, "linewidth": 1.1, "zorder": 3}
    return found


def _panel(axes: Axes, sweep: Sweep, looks: dict[str, dict[str, Any]], theme: style.Theme) -> None:
    lines: dict[str, Line] = {}
    for x, result in zip(sweep.xs, sweep.results, strict=True):
        if result.floor_seconds:
            lines.setdefault("floor", []).append((x, result.floor_seconds))
        for s in result.scores:
            if s.seconds:
                lines.setdefault(s.contestant, []).append((x, s.seconds))
    floor = {"color": theme.ink, "linewidth": 1.0, "linestyle": (0, (4, 2))}
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), **looks.get(name, floor))
    style.log_axis(axes.xaxis, "", sorted(set(sweep.xs)), room=0.3)
    style.log_axis(axes.yaxis, "time")
    colours = {name: looks.get(name, floor)["color"] for name in lines}
    whole = {name: line[-1] for name, line in lines.items() if line[-1][0] == sweep.xs[-1]}
    ours = {style.short(name, NAME) for name in lines if name in looks and looks[name]["color"] == theme.ours}
    style.end_labels(
        axes, [(*end, style.short(name, NAME), colours[name]) for name, end in whole.items()], theme, 6.5, bold=ours
    )
    taken = [
        box for line in lines.values() for box in style.covered(axes, [x for x, _ in line], [t for _, t in line], 3)
    ]
    # what ends before the others has its name within: a line to the margin would look like times
    style.near_labels(
        axes, [(line, style.short(name, NAME)) for name, line in lines.items() if name not in whole], taken, theme, 6.5
    )
