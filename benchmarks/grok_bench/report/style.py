"""What all figures share: colours, marks, a canvas measured in inches, and labels that do not lie on one another."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log10
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from .units import amount, duration

WIDTH = 7.2  # inches: two columns of a paper


@dataclass(frozen=True)
class Theme:
    """Colours by role, no two of them equal: the page turns them into variables. Peers' are told apart with a red-green
    blindness too, and nothing is told by colour alone."""

    name: str
    paper: str
    ink: str
    quiet: str
    rule: str
    ours: str
    soft: str  # ours, as an area
    peers: tuple[str, ...]

    def roles(self) -> dict[str, str]:
        named = {role: getattr(self, role) for role in ("paper", "ink", "quiet", "rule", "ours", "soft")}
        return named | {f"peer{i}": colour for i, colour in enumerate(self.peers)}


LIGHT = Theme(
    "light", paper="#ffffff", ink="#1b1f24", quiet="#5b6470", rule="#dde1e6", ours="#0b5cad", soft="#b9d4ee",
    peers=("#b84a00", "#00795a", "#96447a", "#8a6500", "#4b4fb3", "#6b7075"),
)  # fmt: skip
DARK = Theme(
    "dark", paper="#14171b", ink="#e8eaed", quiet="#9aa4b0", rule="#30363e", ours="#5aa9f5", soft="#24496c",
    peers=("#f08c4a", "#3ec79e", "#d992bd", "#d9b13b", "#a3a6f2", "#a9aeb4"),
)  # fmt: skip
THEMES = (LIGHT, DARK)
MARKERS = ("s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ((0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)), (0, (8, 2)), "-")


def rc(theme: Theme) -> Any:
    """Matplotlib's settings."""
    return {
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "text.color": theme.ink,
        "axes.edgecolor": theme.quiet,
        "axes.labelcolor": theme.ink,
        "axes.facecolor": "none",
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 8,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.color": theme.rule,
        "grid.linewidth": 0.6,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
        "hatch.linewidth": 0.7,
        "svg.fonttype": "none",  # text that can be found and read aloud
        "svg.hashsalt": "grok-bench",
    }


def themed(theme: Theme) -> Any:
    return matplotlib.rc_context(rc(theme))


def canvas(theme: Theme, width: float, height: float, title: str, subtitle: str, caption: str) -> Figure:
    """A page with its title at the top left and its source at the bottom; some 0.55 and 0.3 inches of it are taken."""
    figure = Figure(figsize=(width, height), facecolor=theme.paper)
    figure.text(0.1 / width, 1 - 0.1 / height, title, va="top", weight="bold", size=10)
    figure.text(0.1 / width, 1 - 0.32 / height, subtitle, va="top", size=7.5, color=theme.quiet)
    figure.text(0.1 / width, 0.07 / height, caption, va="bottom", size=6.5, color=theme.quiet)
    return figure


def place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at that place, in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def short(text: str, most: int) -> str:
    """Its middle left out: names often differ at their ends."""
    head = round(0.6 * (most - 1))
    return text if len(text) <= most else text[:head].rstrip(" ,-") + "…" + text[len(text) - (most - 1 - head) :]


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the order of the wanted ones and as near to them as squares can be."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[tuple[float, int]] = []  # mean of (wanted - rank * gap), how many
    for rank, i in enumerate(order):
        mean, size = wanted[i] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    found = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        found[i] = flat[rank] + rank * gap
    return found


def end_labels(
    axes: Axes, ends: Sequence[tuple[float, float, str, str]], theme: Theme, size: float = 7, bold: Container[str] = ()
) -> None:
    """Names at the right of the axes, each (x, y, name, colour) joined to the end of its line."""
    freeze(axes)
    figure = axes.figure
    points = [axes.transData.transform((x, y)) for x, y, *_ in ends]
    dpi = figure.dpi
    frame = axes.get_window_extent()
    right, gap = frame.x1, 1.35 * size * dpi / 72
    heights = spread([float(y) for _, y in points], gap)
    # where many lines end at the top their names go down, not over the title; so at the bottom
    shift = min(0.0, frame.y1 - max(heights)) or max(0.0, frame.y0 - gap - min(heights))
    heights = [height + shift for height in heights]
    inverse = axes.transAxes.inverted()
    for (x, y, name, colour), height in zip(ends, heights, strict=True):
        at = inverse.transform((right + 0.16 * dpi, height))
        bend = inverse.transform((right + 0.12 * dpi, height))
        start = inverse.transform(axes.transData.transform((x, y)))
        axes.plot(
            [start[0], inverse.transform((right + 0.02 * dpi, 0))[0], bend[0]], [start[1], start[1], bend[1]],
            color=colour, linewidth=0.6, transform=axes.transAxes, clip_on=False, zorder=1,
        )  # fmt: skip
        weight = "bold" if name in bold else "normal"
        axes.text(at[0], at[1], name, size=size, va="center", color=theme.ink, weight=weight, transform=axes.transAxes)


def freeze(axes: Axes) -> None:
    """What is drawn from now on moves no limit, so that places in pixels hold."""
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())


def covered(axes: Axes, xs: Sequence[float], ys: Sequence[float], half: float = 2.0) -> list[Bbox]:
    """Boxes along a line through the points, in pixels, for labels to keep away from."""
    points = [axes.transData.transform((x, y)) for x, y in zip(xs, ys, strict=True)]
    found = []
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / 4))
        for i in range(steps + 1):
            x, y = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
            found.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    return found


DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1), (0.4, -1), (-0.4, 1))
DISTANCES = (0.09, 0.16, 0.26, 0.4, 0.55, 0.75, 1.0, 1.3)  # inches


def near_labels(
    axes: Axes,
    labels: Sequence[tuple[Sequence[tuple[float, float]], str]],
    taken: list[Bbox],
    theme: Theme,
    size: float = 7,
) -> None:
    """Each name near one of its points, where it covers the least of what is `taken` (in pixels) and stays within the axes.

    Where it is not right beside it, a thin line leads there, past as little as can be. Both are added to `taken`.
    """
    freeze(axes)
    frame, dpi = axes.get_window_extent(), axes.figure.dpi
    inverse = axes.transData.inverted()
    for points, name in labels:
        text = axes.text(*points[0], name, size=size, color=theme.ink, va="center", ha="center")
        box = text.get_window_extent()
        half = np.array([box.width / 2 + 2, box.height / 2 + 1])
        full = np.array([b.extents for b in taken]).reshape(-1, 4)
        found: list[tuple[float, Bbox, list[tuple[float, float]]]] = []
        for at, distance, point in _places(axes, points, half):
            lead = _leader(point, at, 0.1 * dpi)
            crossed = sum(_inside(full, p) for p in lead[3:])
            outside = at.width * at.height - _overlap(np.array([frame.extents]), at)
            cost = _overlap(full, at) + 3 * outside + 12 * crossed + 40 * distance
            found.append((cost, at, lead))
        _, at, lead = min(found, key=lambda f: f[0])
        text.set_position(tuple(inverse.transform(((at.x0 + at.x1) / 2, (at.y0 + at.y1) / 2))))
        if lead:
            axes.plot(*inverse.transform([lead[0], lead[-1]]).T, color=theme.quiet, linewidth=0.5, zorder=1)
        taken += [at, *(Bbox.from_extents(px - 1, py - 1, px + 1, py + 1) for px, py in lead)]


def _places(axes: Axes, points: Sequence[tuple[float, float]], half: Any) -> Iterator[tuple[Bbox, float, Any]]:
    """Boxes of that half size around each point, with their distance and the point in pixels."""
    for point in axes.transData.transform(points):
        for distance in DISTANCES:
            for direction in DIRECTIONS:
                centre = point + np.array(direction) * (distance * axes.figure.dpi + half)
                yield Bbox([centre - half, centre + half]), distance, point


def _leader(point: Any, box: Bbox, least: float) -> list[tuple[float, float]]:
    """Points, some three pixels apart, from a label's point to its box; none where it is nearer than `least`."""
    end = np.clip(point, (box.x0, box.y0), (box.x1, box.y1))
    length = float(np.hypot(*(end - point)))
    if length <= least:
        return []
    return [tuple(point + (end - point) * t) for t in np.linspace(0, 1, max(2, int(length / 3)))]


def _overlap(boxes: Any, box: Bbox) -> float:
    """The area of `box` under the rows (x0, y0, x1, y1) of `boxes`."""
    width = np.minimum(boxes[:, 2], box.x1) - np.maximum(boxes[:, 0], box.x0)
    height = np.minimum(boxes[:, 3], box.y1) - np.maximum(boxes[:, 1], box.y0)
    return float((width.clip(min=0) * height.clip(min=0)).sum())


def _inside(boxes: Any, point: tuple[float, float]) -> bool:
    x, y = point
    return bool(((boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])).any())


def steps(low: float, high: float) -> list[float]:
    """Of each decade within: 1, or with 2 and 5, or with more, so that they are few and yet not too few."""
    found: list[float] = []
    for ladder in ((1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), (1.0, 2.0, 5.0), (1.0,)):
        found = [m * 10.0**e for e in range(-9, 16) for m in ladder if low <= m * 10.0**e <= high]
        if len(found) < 8:
            break
    return found


def log_axis(axis: Any, kind: str, ticks: Sequence[float] = (), room: float = 0.0) -> None:
    """Ticks of a log axis as times, rates (with kind as their unit) or plain numbers; of `ticks` those that lie
    `room` inches apart, the first among them."""
    low, high = axis.get_view_interval()
    if ticks and room:
        box = axis.axes.get_window_extent()
        decade = box.width / axis.axes.figure.dpi / log10(high / low)
        kept = [ticks[0]]
        for t in ticks[1:]:
            if abs(log10(t / kept[-1])) * decade >= room:
                kept.append(t)
        ticks = kept
    axis.set_major_locator(FixedLocator(list(ticks) or steps(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, kind)))


def tick(value: float, kind: str) -> str:
    if kind == "time":
        number, unit = duration(value).split(" ")
    elif kind:
        number, _, unit = amount(value, kind).partition(" ")
    else:
        return f"{value:,.0f}" if value >= 10 else f"{value:g}"
    return f"{float(number.replace(',', '')):,g} {unit}"
