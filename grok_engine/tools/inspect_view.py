"""Draws an inspection report for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import zip_longest
from operator import add

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .inspect import Report, TensorReport
from .verify import Stats

_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
Group = Sequence[TensorReport]  # what shares a row of a table


def render(report: Report, console: Console, *, every_tensor: bool = False) -> None:
    """Prints the report. Equal tensors of several layers share a row unless `every_tensor`."""
    c = report.config
    rows = [[t] for t in report.tensors] if every_tensor else _grouped(report.tensors)
    console.print(Text(c.name, style="bold"), Text(report.path, style="dim"))
    blocks = [f"top {c.num_experts_per_tok} of {c.num_experts} experts of width {c.d_ff}"] if c.num_experts else []
    blocks += [f"a dense block of width {c.dense_d_ff}"] if c.dense_d_ff else []
    capped = f"attention capped at {c.attn_softcap:g} · " if c.attn_softcap else ""
    count = f"{len(report.tensors)} {'tensors' if report.files is None else 'files'}"
    facts = (
        f"{c.num_layers} layers · width {c.d_model} · {c.num_heads} query and {c.num_kv_heads} key/value heads "
        f"of {c.head_dim} · vocabulary {c.vocab_size:,}",
        f"{' and '.join(blocks)} ({c.activation}) · {capped}context {c.max_position:,}",
        f"{_scaled(c.param_count(), 'BMk', '', 1)} parameters, {_scaled(c.active_param_count(), 'BMk', '', 1)} used "
        f"per token · {count} · {report.total_bytes:,} bytes",
    )
    for line in facts:
        console.print(Text(line))
    for table in (_sizes(report), _tensors(rows)):
        console.print()
        console.print(table)
    scales = "scales: groups × the inputs that share one · " if any(t.groups for t in report.tensors) else ""
    console.print(Text(f"{scales}bits: of a weight in a CPU's memory, with its scales", style="dim"))
    if report.verified:
        console.print()
        console.print(_ranges(rows))
    console.print()
    if report.problems:
        console.print(Text(f"{len(report.problems)} problem(s)", style="bold red"))
        for problem in report.problems:
            console.print(Text(f"  {problem}", style="red"))
    else:
        checked = "Every number read: sound." if report.verified else "Every header fits; no weight was read."
        console.print(Text(checked, style="green"))


def _sizes(report: Report) -> Table:
    table = _table("bytes by kind", ">", ">share", "bytes by dtype", ">", ">share")
    columns = (
        [(name, f"{n:,}", _share(n, report.total_bytes)) for name, n in sizes.items() if n]
        for sizes in (report.bytes_by_kind, report.bytes_by_dtype)
    )
    for kind, dtype in zip_longest(*columns, fillvalue=("", "", "")):
        table.add_row(*kind, *dtype)
    return table


def _tensors(rows: Sequence[Group]) -> Table:
    every = all(len(group) == 1 for group in rows)
    table = _table("tensor", "file" if every else ">tensors", ">shape", "dtype", ">scales", ">bits", ">bytes")
    for group in rows:
        first = group[0]
        table.add_row(
            _name(group),
            first.file if every else str(len(group)),
            "×".join(map(str, first.shape)),
            _short(first.dtype),
            " ".join(map(_short, first.groups.split(" "))),
            f"{first.memory_bits:.4g}",
            _scaled(sum(t.nbytes for t in group), "GMk", "B", 2),
        )
    return table


def _ranges(rows: Sequence[Group]) -> Table:
    table = _table("tensor", ">weight min", ">max", ">scale min", ">max", ">NaN", ">inf")
    for group in rows:
        weight = reduce(add, (t.weight for t in group if t.weight is not None), Stats())
        scales = reduce(add, (t.scales for t in group if t.scales is not None), Stats())
        ends = (weight.minimum, weight.maximum, scales.minimum, scales.maximum)
        table.add_row(
            _name(group),
            *("" if x is None else f"{x:.4g}" for x in ends),
            *(f"{n:,}" if n else "" for n in (weight.nan + scales.nan, weight.inf + scales.inf)),
        )
    return table


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        right = header.startswith(">")
        # Only the first column may wrap: a name can list many layers, and numbers must not be broken.
        table.add_column(header.removeprefix(">"), justify="right" if right else "left", no_wrap=i > 0, overflow="fold")
    return table


def _grouped(tensors: Iterable[TensorReport]) -> list[list[TensorReport]]:
    groups: dict[object, list[TensorReport]] = {}
    for t in tensors:
        groups.setdefault((_layer(t.name)[1], t.shape, t.dtype, t.groups, t.memory_bits), []).append(t)
    return list(groups.values())


def _name(group: Group) -> str:
    _, suffix = _layer(group[0].name)
    layers = sorted(n for t in group if (n := _layer(t.name)[0]) is not None)
    return f"layers.{_spans(layers)}.{suffix}" if layers else suffix


def _layer(name: str) -> tuple[int | None, str]:
    if not name.startswith("layers."):
        return None, name
    _, layer, suffix = name.split(".", 2)
    return int(layer), suffix


def _spans(numbers: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


def _short(dtype: str) -> str:
    return _SHORT.get(dtype, dtype)


def _scaled(n: int, prefixes: str, unit: str, digits: int) -> str:
    for prefix, size in zip(prefixes, (10**9, 10**6, 10**3), strict=True):
        if n >= size:
            return f"{n / size:.{digits}f} {prefix}{unit}"
    return f"{n} {unit}".rstrip()


def _share(n: int, total: int) -> str:
    share = 100 * n / total
    return f"{share:.1f}%" if share >= 0.1 else "<0.1%"
