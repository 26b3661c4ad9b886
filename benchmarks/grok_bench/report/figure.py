"""The one figure, as SVG: at each problem, how many times as fast as the best peer the subject's fastest is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import log

from ..schema import ResultFile
from .rows import best_of_ours, suspect

COLOURS = ("#0b5cad", "#b84a00", "#00795a", "#96447a", "#6b7075", "#8a6500")  # distinct under colour blindness
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
WIDTH, LEFT, RIGHT, ROW, LEGEND = 360, 112, 12, 20, 14  # of a narrow screen, so that text is read there, too


def svg(files: Sequence[ResultFile]) -> str:
    """An <svg> element: a row for each op, a mark for each problem, a colour for each file; right of 1 is faster.

    The same results give the same bytes. ValueError where no problem was measured beside a peer.
    """
    raced = [
        (file, [(r.op, s.speedup) for r in file.kernels if (s := best_of_ours(r)) and s.speedup and not suspect(s)])
        for file in files
    ]
    raced = [(file, marks) for file, marks in raced if marks]
    ops = list(dict.fromkeys(op for _, marks in raced for op, _ in marks))
    if not ops:
        raise ValueError("no result has a peer's time beside the subject's: there is nothing to draw")
    ratios = [ratio for _, marks in raced for _, ratio in marks]
    low, high = min(*ratios, 1) / 1.15, max(*ratios, 1) * 1.15
    top = LEGEND * len(raced) + 8
    bottom = top + ROW * len(ops)

    def x(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * log(ratio / low) / log(high / low)

    def drawn() -> Iterator[str]:
        for i, (file, _) in enumerate(raced):
            name = f"{file.environment.chip}, {file.created[:10]}"
            short = name if len(name) < 56 else f"{name[:42]}… {file.created[:10]}"
            yield f'<circle cx="8" cy="{LEGEND * i + 10}" r="3" fill="{COLOURS[i % 6]}"/>'
            yield f'<text x="16" y="{LEGEND * i + 13}">{escape(short)}<title>{escape(name)}</title></text>'
        for tick in (t for t in TICKS if low <= t <= high):
            colour = "#000" if tick == 1 else "#dde1e6"
            yield f'<path d="M{x(tick):.1f} {top}V{bottom}" stroke="{colour}"/>'
            yield f'<text x="{x(tick):.1f}" y="{bottom + 12}" text-anchor="middle">{tick:g}</text>'
        for j, op in enumerate(ops):
            middle = top + ROW * (j + 0.5)
            yield f'<text x="{LEFT - 6}" y="{middle + 3:.1f}" text-anchor="end">{escape(op)}</text>'
            for i, (_, marks) in enumerate(raced):
                y = middle + (i - (len(raced) - 1) / 2) * 4  # files side by side within a row
                style = f'r="2.2" fill="{COLOURS[i % 6]}" fill-opacity="0.75"'
                yield from (f'<circle cx="{x(ratio):.1f}" cy="{y:.1f}" {style}/>' for o, ratio in marks if o == op)
        middle = (LEFT + WIDTH - RIGHT) / 2
        yield f'<text x="{middle}" y="{bottom + 26}" text-anchor="middle">× the best peer (log scale)</text>'

    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 32}" font-family="sans-serif" '
    return "\n".join(
        [head + 'font-size="10" role="img">', '<rect width="100%" height="100%" fill="#fff"/>', *drawn(), "</svg>\n"]
    )
