"""The one figure: at each problem, how many times as fast as the best peer our fastest contestant is."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..schema import ResultFile
from .rows import best_of_ours

COLOURS = ("#0b5cad", "#b84a00", "#00795a", "#96447a", "#6b7075", "#8a6500")  # distinct under colour blindness
MARKERS = "osD^vP"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "grok-bench",
    "font.size": 8,
}  # text as text, the same bytes again


class MissingLibrary(ValueError):
    """A library that only figures need is not installed."""


def speedup(files: Sequence[ResultFile]) -> Any:
    """A row for each op, a mark for each problem, a colour and shape for each machine; right of 1 ours is faster.

    MissingLibrary without matplotlib; ValueError where no problem was measured beside a peer.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullLocator
    except ImportError:
        raise MissingLibrary("figures need matplotlib: pip install '.[bench]'") from None
    raced = [[(r.op, s.speedup) for r in f.kernels if (s := best_of_ours(r)) and s.speedup] for f in files]
    ops = list(dict.fromkeys(op for marks in raced for op, _ in marks))[::-1]
    if not ops:
        raise ValueError("no result has a peer's time beside ours: there is nothing to draw")
    figure = Figure(figsize=(7.2, 1.6 + 0.3 * len(ops)), layout="constrained", facecolor="white")
    axes = figure.add_subplot(xscale="log", xlabel="× the best peer in the same rounds (log scale)")
    shown = [(file, marks) for file, marks in zip(files, raced, strict=True) if marks]
    for i, (file, marks) in enumerate(shown):
        shift = (i - (len(shown) - 1) / 2) * 0.22  # machines side by side within a row
        heights = [ops.index(op) - shift for op, _ in marks]
        label = f"{file.environment.chip}, {file.created[:10]}"
        style: dict[str, Any] = {"color": COLOURS[i % 6], "marker": MARKERS[i % 6], "alpha": 0.75, "linewidth": 0}
        axes.scatter([ratio for _, ratio in marks], heights, s=14, label=label, **style)
    axes.axvline(1, color="black", linewidth=0.8)
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in TICKS if low <= t <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(ops)), ops)
    axes.grid(axis="both", color="#dde1e6", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", frameon=False)
    return figure


def svg(files: Sequence[ResultFile]) -> str:
    """The figure as an <svg> element; the same results give the same bytes."""
    figure = speedup(files)  # before matplotlib itself: it says what to install
    import matplotlib

    file = io.StringIO()
    silent = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(file, format="svg", metadata=silent)
    text = file.getvalue()
    return text[text.index("<svg") :]
