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

NAMES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "E2E"}


@contextmanager
def request_progress(total: int, what: str = "requests") -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, drawn twice a second at most and by the caller: no thread runs beside a measurement."""
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


def render(result: EngineResult, environment: Environment, *, interrupted: bool = False) -> Group:
    """Two tables: the run, and its latencies in milliseconds."""
    p = result.parameters
    weights = f"{'random ' if p['dummy'] else ''}{p['weights'] or 'stored'} weights"
    table = Table(
        title=f"{result.protocol}: {result.model}, {p['layers']} layers, {weights}, {p['dtype']} on {p['device']}",
        title_justify="left",
        box=None,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="cyan")
    table.add_column()
    clock = f", {environment.isa}" if environment.isa and environment.device == "cpu" else ""
    table.add_row("machine", f"{environment.chip}, {environment.threads} threads{clock}")
    failed = f", {result.failed} failed" if result.failed else ""
    table.add_row("requests", f"{result.completed} completed{failed}{', interrupted' if interrupted else ''}")
    table.add_row("tokens", f"{result.input_tokens:,} in, {result.output_tokens:,} out")
    table.add_row("duration", f"{result.duration_seconds:.2f} s, after {result.load_seconds:.2f} s of loading")
    table.add_row("requests/s", f"{result.requests_per_second:.2f}")
    table.add_row("output tokens/s", f"{result.output_tokens_per_second:,.1f}")
    table.add_row("total tokens/s", f"{result.total_tokens_per_second:,.1f}")
    if result.goodput_per_second is not None and result.slo is not None:
        limits = ", ".join(f"{name.removesuffix('_ms')} ≤ {limit:g} ms" for name, limit in result.slo.items())
        table.add_row("goodput", f"{result.goodput_per_second:.2f} requests/s with {limits}")
    _add_timeline(table, result)
    table.add_row("peak memory", f"{result.peak_memory_bytes / 1e6:,.0f} MB")
    return Group(table, "", _latencies(result))


def _add_timeline(table: Table, result: EngineResult) -> None:
    moments = result.timeline
    if not moments:
        return
    spans = [after.t - m.t for m, after in pairwise(moments)]  # the last moment has none
    for name, counts in (("running", [m.running for m in moments]), ("waiting", [m.waiting for m in moments])):
        mean = sum(n * span for n, span in zip(counts, spans, strict=False)) / (sum(spans) or 1.0)
        table.add_row(name, f"{mean:.1f} on average, {max(counts)} at most")
    used, pages = max(m.kv_pages_used for m in moments), moments[-1].kv_pages
    table.add_row("pages of keys, values", f"{used} of {pages} at most, {used / pages:.0%}")
    hits = moments[-1].prefix_hit_tokens
    share = f", {hits / result.input_tokens:.0%} of the prompts" if result.input_tokens else ""
    table.add_row("prefix hits", f"{hits:,} tokens{share}")


def _latencies(result: EngineResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("ms", style="cyan")
    for name in ("mean", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for key, name in NAMES.items():
        found = result.metrics[key]
        values = (found.mean, found.p50, found.p90, found.p99) if found else ()
        table.add_row(name, *([f"{value * 1e3:,.2f}" for value in values] or ["–"] * 4))
    return table
