"""Figures of engines: latency against throughput, and what a run held over its time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..schema import EngineResult, ResultFile
from .rows import caption, engine_results, parameters
from .style import DASHES, MARKERS, WIDTH, Theme, canvas, covered, log_axis, near_labels, place, short
from .sweeps import number

VARIES = ("request_rate", "num_requests")  # along a curve
Parts = tuple[str, str, Callable[[Theme], Figure]]


def all_of(file: ResultFile) -> Iterator[Parts]:
    curves = {name: runs for name, runs in _curves(engine_results(file)).items() if len(runs) > 1}
    if curves:
        yield "latency", "Latency against throughput", partial(latency, file, curves)
    drawn = [r for r in engine_results(file) if len(r.timeline) > 1]
    for i, run in enumerate(drawn):
        number = f"-{i + 1}" if len(drawn) > 1 else ""
        yield f"timeline{number}", f"Timeline of a run: {_told(run)}", partial(timeline, file, run)


def _told(run: EngineResult) -> str:
    rate = number(run.parameters, "request_rate")
    return f"{run.model}, {run.protocol}" + ("" if rate is None else f" at {rate:g} requests/s")


def _curves(runs: list[EngineResult]) -> dict[str, list[EngineResult]]:
    """Runs that differ in the rate of requests alone, named by what tells the curves apart."""
    groups: dict[str, list[EngineResult]] = {}
    for r in runs:
        if r.metrics.get("ttft") and number(r.parameters, "request_rate") is not None:
            rest = {k: v for k, v in r.parameters.items() if k not in VARIES}
            groups.setdefault(json.dumps([r.protocol, r.model, rest], sort_keys=True), []).append(r)
    found: dict[str, list[EngineResult]] = {}
    first = [group[0] for group in groups.values()]
    for r in first:
        other = {k: v for k, v in r.parameters.items() if any(o.parameters.get(k) != v for o in first)}
        name = parameters(other, VARIES) or r.model
        group = next(g for g in groups.values() if g[0] is r)
        found[name] = sorted(group, key=lambda run: number(run.parameters, "request_rate") or 0.0)
    return found


def latency(file: ResultFile, curves: dict[str, list[EngineResult]], theme: Theme) -> Figure:
    figure = canvas(
        theme, WIDTH, 3.9, "Latency against throughput",
        "solid: median; dashed: 99th percentile; a point is a run at the rate of requests beside it (left)", caption(file),
    )  # fmt: skip
    for i, (key, title) in enumerate((("ttft", "time to first token"), ("tpot", "time per token after it"))):
        axes = place(figure, 0.7 + i * 3.6, 0.8, 2.7, 2.3)
        axes.set_title(title)
        axes.set(yscale="log", xlabel="output tokens/s")
        drawn: list[tuple[list[float], list[float]]] = []
        for k, runs in enumerate(curves.values()):
            colour, marker = (theme.ours, *theme.peers)[k % 7], ("o", *MARKERS)[k % 7]
            xs = [r.output_tokens_per_second for r in runs]
            for quantile, dash in (("p50", "-"), ("p99", DASHES[0])):
                ys = [_at(r, key, quantile) for r in runs]
                fill = colour if dash == "-" else theme.paper
                axes.plot(xs, ys, color=colour, marker=marker, linestyle=dash, mfc=fill)
                drawn.append((xs, ys))
        slo = next(
            (r.slo[f"{key}_ms"] / 1e3 for rs in curves.values() for r in rs if r.slo and f"{key}_ms" in r.slo), None
        )
        if slo:
            axes.axhline(slo, color=theme.ink, linewidth=0.9, linestyle=(0, (1, 2)))
        low, high = axes.get_ylim()
        low, high = low / 1.4, high * 1.25
        axes.set(ylim=(low, high), xlim=(0, 1.1 * max(x for xs, _ in drawn for x in xs)))
        log_axis(axes.yaxis, "time")
        taken = [box for xs, ys in drawn for box in covered(axes, xs, ys, 3)]
        if slo:
            right = axes.get_xlim()[1]
            axes.annotate(
                "objective",
                (right, slo),
                xytext=(-2, 1.5),
                textcoords="offset points",
                ha="right",
                size=6.5,
                va="bottom",
            )
            taken += covered(axes, [0, right], [slo, slo], 5)
        rates = [([(r.output_tokens_per_second, _at(r, key, "p50"))], _rate(r)) for rs in curves.values() for r in rs]
        near_labels(axes, rates if key == "ttft" else [], taken, theme, 6)
        names = list(curves) if len(curves) > 1 else []
        near_labels(axes, [(_points(curves[name], key), short(name, 24)) for name in names], taken, theme)
    return figure


def _points(runs: list[EngineResult], key: str) -> list[tuple[float, float]]:
    found = [(r.output_tokens_per_second, _at(r, key, q)) for r in runs for q in ("p50", "p99")]
    return [(x, y) for x, y in found if y == y]


def _rate(run: EngineResult) -> str:
    return f"{run.parameters['request_rate']:g}/s"


def _at(run: EngineResult, key: str, quantile: str) -> float:
    found = run.metrics.get(key)
    return float("nan") if found is None else float(getattr(found, quantile))


def timeline(file: ResultFile, run: EngineResult, theme: Theme) -> Figure:
    """Requests running and waiting, and the share of pages in use."""
    figure = canvas(
        theme, WIDTH, 4.1, f"Timeline: {_told(run)}",
        f"{run.completed} requests done, {run.failed} failed, {run.output_tokens:,} tokens out", caption(file),
    )  # fmt: skip
    t = [point.t for point in run.timeline]
    upper, lower = (place(figure, 0.7, bottom, WIDTH - 0.9, 1.05) for bottom in (2.3, 0.75))
    running, waiting = ([getattr(point, k) for point in run.timeline] for k in ("running", "waiting"))
    upper.fill_between(t, waiting, step="post", facecolor="none", edgecolor=theme.peers[0], hatch="////", linewidth=0)
    upper.step(t, waiting, where="post", color=theme.peers[0], linewidth=1.0, linestyle=DASHES[0])
    upper.step(t, running, where="post", color=theme.ours, linewidth=1.8)
    upper.set_title("requests running (solid) and waiting (hatched)", weight="normal")
    upper.set(ylabel="requests", xlim=(0, t[-1]), ylim=(0, 1.15 * max(1, *running, *waiting)))
    upper.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    upper.tick_params(labelbottom=False)
    share = [100 * point.kv_pages_used / max(1, point.kv_pages) for point in run.timeline]
    lower.fill_between(t, share, step="post", facecolor=theme.soft, linewidth=0)
    lower.step(t, share, where="post", color=theme.ours, linewidth=1.4)
    lower.set_title(f"pages of keys and values in use, of {run.timeline[-1].kv_pages:,}", weight="normal")
    lower.set(ylabel="%", xlabel="seconds from the start", xlim=(0, t[-1]))
    lower.set_ylim(0, min(105, max(1, 1.25 * max(share))))
    return figure
