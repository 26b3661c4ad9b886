"""Draws a plan for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grok_engine.log import size_text

from .plan import Plan
from .plan_cpu import CpuPlan


def render(plan: Plan, console: Console) -> None:
    """Print `plan` as a table of at most 100 columns."""
    p, gb, table = plan, 1e9, _table()
    released = f" · {p.released_bytes / gb:,.1f} GB as released" if p.released_bytes else ""
    sizes = f"{_count(p.params_total)} parameters, {_count(p.params_active)} active"
    table.add_row("model", Text(f"{p.model} · {sizes}{released}"))  # a name may look like markup
    if p.on_cpu is not None and p.stored_bytes is not None:
        held = f"{p.on_cpu.nbytes / 1e6:,.0f} MB, {p.on_cpu.bits:.2f} bits each ({', '.join(p.on_cpu.formats)})"
        table.add_row("file", Text(f"{p.stored_bytes / 1e6:,.0f} MB · matrices on a CPU {held}"))
    table.add_row(
        "on",
        f"{p.gpus} x {p.chip} · weights {p.weights} · head {p.head} · KV {p.kv} · {p.batch} x {p.context:,} tokens",
    )

    verdict = Text.assemble(("fits", "bold green") if p.fits else ("does not fit", "bold red"))
    verdict.append(f", {abs(p.headroom_bytes) / gb:,.1f} GB a GPU {'free' if p.fits else 'short'} · ")
    least = f"fewest GPUs that hold it: {p.min_gpus}" if p.min_gpus else "no number of GPUs holds it"
    table.add_row("verdict", verdict.append(f"{least} (of {', '.join(map(str, p.valid_gpus))})", style="dim"))

    uses = (
        ("weights", p.weight_bytes, "blue"),
        ("workspace", p.workspace_bytes, "yellow"),
        ("KV", p.kv_bytes, "magenta"),
    )
    bar, legend, used, scale = Text(), Text(), 0, max(p.usable_bytes, p.usable_bytes - p.headroom_bytes)
    for name, size, colour in uses:
        used += size
        bar.append("█" * (round(60 * used / scale) - len(bar)), style=colour)
        legend.append(f"{name} {size / gb:,.2f}  ", style=colour)
    table.add_row("GB a GPU", bar.append("░" * (60 - len(bar)), style="dim"))
    table.add_row("", legend.append(f"of {p.usable_bytes / gb:,.1f} usable, {p.memory_bytes / gb:,.1f} in all"))

    room = f"room for {p.kv_capacity_tokens:,} tokens, {p.max_requests:,} requests of {p.context:,}"
    table.add_row("KV cache", f"{p.kv_bytes_per_token / 1024:,.4g} KiB a token · {room}")
    for name, t in (("decode", p.decode), ("prefill", p.prefill)):
        parts = f" (memory {t.memory_s * 1e3:,.2f}, compute {t.compute_s * 1e3:,.2f}, links {t.link_s * 1e3:,.2f})"
        table.add_row(
            name, Text(f"at best {t.tokens_per_s:,.0f} tokens/s · {t.total_s * 1e3:,.2f} ms").append(parts, "dim")
        )
    _print(table, p.assumptions, console)


def render_cpu(plan: CpuPlan, console: Console) -> None:
    """Print `plan` as a table of at most 100 columns."""
    p, table = plan, _table()
    table.add_row("model", Text(f"{p.model} · {_count(p.params_total)} parameters, {_count(p.params_active)} active"))
    formats = f"weights {p.weights} · head {p.head} · KV {p.kv}"
    table.add_row("on", f"a CPU · {formats} · {p.batch} x {p.context:,} tokens")
    table.add_row("memory", f"{size_text(p.weight_bytes)} of weights, {size_text(p.kv_bytes)} of KV")
    parts = f"layers {size_text(p.read_layers)}, head {size_text(p.read_head)}, KV {size_text(p.read_kv)}"
    table.add_row("a step reads", f"{size_text(p.read_layers + p.read_head + p.read_kv)} ({parts})")
    best = "about" if p.rates.measured else "at best"
    table.add_row("decode", f"{best} {float(f'{p.tokens_per_s:.3g}'):,g} tokens/s · {p.step_s * 1e3:,.3g} ms a step")
    _print(table, p.assumptions, console)


def _table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    return table


def _print(table: Table, assumptions: tuple[str, ...], console: Console) -> None:
    width = min(console.width, 100)
    console.print(table, width=width)
    for line in assumptions:
        console.print(Padding(Text(line, style="dim"), (0, 0, 0, 2)), width=width)


def _count(params: int) -> str:
    return f"{params / 1e9:,.1f} B" if params >= 1e9 else f"{params / 1e6:,.1f} M"
