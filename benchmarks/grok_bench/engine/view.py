"""The result of a run for a person: rates, latencies, and what the engine was busy with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from grok_bench.schema import EngineResult, Environment


@contextmanager
def request_progress(total: int, what: str = "requests") -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, drawn by the caller, twice a second at most: no thread disturbs a measurement."""
    console = Console(stderr=True)
    columns = (TextColumn(f"{{task.completed}}/{{task.total}} {what}"), BarColumn(), TimeRemainingColumn())
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        drawn = 0.0

        def show(done: int) -> None:
            nonlocal drawn
            if shown and time.monotonic() - drawn >= 0.5:
                bar.update(task, completed=done, refresh=True)
                drawn = time.monotonic()

        yield show


def render(r: EngineResult, environment: Environment, *, interrupted: bool = False) -> Group:
    """Two tables: the run, and its latencies in milliseconds."""
    p = r.parameters
    weights = f"{'random ' if p['dummy'] else ''}{p['weights'] or 'stored'} weights"
    title = f"{r.protocol}: {r.model}, {p['layers']} layers, {weights}, {p['dtype']} on {p['device']}"
    isa = f", {environment.isa}" if environment.isa and environment.device == "cpu" else ""
    failed = f", {r.failed} failed" if r.failed else ""
    rows = {
        "machine": f"{environment.chip}, {environment.threads} threads{isa}",
        "requests": f"{r.completed} completed{failed}{', interrupted' if interrupted else ''}",
        "tokens": f"{r.input_tokens:,} in, {r.output_tokens:,} out",
        "duration": f"{r.duration_seconds:.2f} s, after {r.load_seconds:.2f} s of loading",
        "requests/s": f"{r.requests_per_second:.2f}",
        "output tokens/s": f"{r.output_tokens_per_second:,.1f}",
        "total tokens/s": f"{r.total_tokens_per_second:,.1f}",
    }
    if r.goodput_per_second is not None and r.slo is not None:
        limits = ", ".join(f"{name.removesuffix('_ms')} ≤ {limit:g} ms" for name, limit in r.slo.items())
        rows["goodput"] = f"{r.goodput_per_second:.2f} requests/s with {limits}"
    rows |= _timeline(r) | {"peak memory": f"{r.peak_memory_bytes / 1e6:,.0f} MB"}
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan")
    table.add_column()
    for row in rows.items():
        table.add_row(*row)
    return Group(table, "", _latencies(r))


def _timeline(r: EngineResult) -> dict[str, str]:
    moments, rows = r.timeline, dict[str, str]()
    if not moments:
        return rows
    spans = [after.t - m.t for m, after in pairwise(moments)]  # the last moment has none
    for name, counts in (("running", [m.running for m in moments]), ("waiting", [m.waiting for m in moments])):
        mean = sum(n * span for n, span in zip(counts, spans, strict=False)) / (sum(spans) or 1.0)
        rows[name] = f"{mean:.1f} on average, {max(counts)} at most"
    used, pages, hits = max(m.kv_pages_used for m in moments), moments[-1].kv_pages, moments[-1].prefix_hit_tokens
    share = f", {hits / r.input_tokens:.0%} of the prompts" if r.input_tokens else ""
    rows["pages of keys, values"] = f"{used} of {pages} at most, {used / pages:.0%}"
    return rows | {"prefix hits": f"{hits:,} tokens{share}"}


def _latencies(r: EngineResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("ms", style="cyan")
    for name in ("mean", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for key, found in r.metrics.items():
        values = (found.mean, found.p50, found.p90, found.p99) if found else ()
        table.add_row(key.upper(), *([f"{value * 1e3:,.2f}" for value in values] or ["–"] * 4))
    return table
