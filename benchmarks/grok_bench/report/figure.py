"""The one figure, as SVG: at each problem, how many times as fast as the best peer the subject's fastest is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log

from ..schema import ResultFile
from .rows import best_of_ours, suspect

COLOURS = ("#0b5cad", "#b84a00", "#00795a", "#96447a", "#6b7075", "#8a6500")  # distinct under colour blindness
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
WIDTH, LEFT, RIGHT, ROW, LEGEND = 360, 112, 12, 20, 14  # of a narrow screen, so that text is read there, too


def marks(files: Sequence[ResultFile]) -> list[tuple[ResultFile, list[tuple[str, float]]]]:
    """(file, (op, ratio) of each problem that was measured beside a peer), without files that have none."""
    found = [(file, [(r.op, best_of_ours(r)) for r in file.kernels]) for file in files]
    raced = [(file, [(op, s.speedup) for op, s in some if s and s.speedup and not suspect(s)]) for file, some in found]
    return [(file, some) for file, some in raced if some]


def svg(files: Sequence[ResultFile]) -> str:
    """An <svg> element: a row for each op, a mark for each problem, a colour for each file; right of 1 is faster.

    The same results give the same bytes. ValueError where no problem was measured beside a peer.
    """
    raced = marks(files)
    if not raced:
        raise ValueError("no result has a peer's time beside the subject's: there is nothing to draw")
    ops = list(dict.fromkeys(op for _, some in raced for op, _ in some))
    ratios = [ratio for _, some in raced for _, ratio in some]
    low, high = min(*ratios, 1) / 1.15, max(*ratios, 1) * 1.15
    top = LEGEND * len(raced) + 8
    bottom = top + ROW * len(ops)

    def x(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * log(ratio / low) / log(high / low)

    def text(x: float, y: float, anchor: str, of: str) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(of)}</text>'

    drawn = [text((LEFT + WIDTH - RIGHT) / 2, bottom + 26, "middle", "× the best peer (log scale)")]
    for tick in (t for t in TICKS if low <= t <= high):
        drawn.append(f'<path d="M{x(tick):.1f} {top}V{bottom}" stroke="{"#000" if tick == 1 else "#dde1e6"}"/>')
        drawn.append(text(x(tick), bottom + 12, "middle", f"{tick:g}"))
    drawn += [text(LEFT - 6, top + ROW * (j + 0.5) + 3, "end", op) for j, op in enumerate(ops)]
    for i, (file, some) in enumerate(raced):
        fill, at = f'fill="{COLOURS[i % 6]}"', LEGEND * i + 10
        drawn.append(f'<circle cx="8" cy="{at}" r="3" {fill}/>')
        drawn.append(text(16, at + 3, "start", f"{file.environment.chip:.42}, {file.created[:10]}"))
        for op, ratio in some:
            y = top + ROW * (ops.index(op) + 0.5) + (i - (len(raced) - 1) / 2) * 4  # files side by side within a row
            drawn.append(f'<circle cx="{x(ratio):.1f}" cy="{y:.1f}" r="2.2" {fill} fill-opacity="0.75"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 32}" font-family="sans-serif" '
    return "\n".join([f'{head}font-size="10" role="img">', '<rect width="100%" height="100%" fill="#fff"/>', *drawn,
                      "</svg>\n"])  # fmt: skip
