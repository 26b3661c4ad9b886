"""Draws an inspection report for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grok_engine.config import ModelConfig

from .report import Report, TensorReport
from .verify import Stats

_SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def render(report: Report, console: Console, *, every_tensor: bool = False) -> None:
    """Prints the report. Equal tensors of several layers share a row unless `every_tensor`."""
    console.print(Text(report.config.name, style="bold"), Text(report.path, style="dim"))
    for line in _architecture(report.config):
        console.print(Text(line))
    console.print(
        Text(
            f"{_count(report.parameters)} parameters, {_count(report.active_parameters)} used per token · "
            f"{len(report.tensors)} files · {report.total_bytes:,} bytes"
        )
    )
    console.print()
    console.print(_sizes(report))
    console.print()
    rows = [[t] for t in report.tensors] if every_tensor else _grouped(report.tensors)
    console.print(_tensors(rows))
    console.print(Text("scales: groups × the input rows that share one", style="dim"))
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


def _architecture(c: ModelConfig) -> Iterable[str]:
    yield (
        f"{c.num_layers} layers · width {c.d_model} · {c.num_heads} query and {c.num_kv_heads} key/value heads "
        f"of {c.head_dim} · vocabulary {c.vocab_size:,}"
    )
    yield (
        f"top {c.num_experts_per_tok} of {c.num_experts} experts of width {c.d_ff} ({c.activation}) · "
        f"attention capped at {c.attn_softcap:g} · context {c.max_position:,}"
    )


def _sizes(report: Report) -> Table:
    table = _table("bytes by kind", ">", ">share", "bytes by dtype", ">", ">share")
    kinds = [(kind, n) for kind, n in report.bytes_by_kind.items() if n]
    dtypes = list(report.bytes_by_dtype.items())
    for i in range(max(len(kinds), len(dtypes))):
        cells: list[str] = []
        for rows in (kinds, dtypes):
            cells += (
                [rows[i][0], f"{rows[i][1]:,}", _share(rows[i][1], report.total_bytes)] if i < len(rows) else [""] * 3
            )
        table.add_row(*cells)
    return table


def _tensors(rows: Sequence[Sequence[TensorReport]]) -> Table:
    every = all(len(group) == 1 for group in rows)
    table = _table("tensor", "file" if every else ">files", ">shape", "dtype", ">scales", ">bytes")
    for group in rows:
        info = group[0].info
        scales = ""
        if info.groups:
            scales = f"{info.groups} × {info.shape[-2] // info.groups} {_SHORT.get(info.scales_dtype or '', '?')}"
        table.add_row(
            _name(group),
            info.file if every else str(len(group)),
            "×".join(map(str, info.shape)),
            _SHORT.get(info.dtype, info.dtype),
            scales,
            _size(sum(t.info.nbytes for t in group)),
        )
    return table


def _ranges(rows: Sequence[Sequence[TensorReport]]) -> Table:
    table = _table("tensor", ">weight min", ">max", ">scale min", ">max", ">NaN", ">inf")
    for group in rows:
        weight = reduce(add, (t.weight for t in group if t.weight is not None), Stats())
        scales = reduce(add, (t.scales for t in group if t.scales is not None), Stats())
        both = weight + scales
        table.add_row(
            _name(group),
            *(_number(x) for x in (weight.minimum, weight.maximum, scales.minimum, scales.maximum)),
            *(f"{n:,}" if n else "" for n in (both.nan, both.inf)),
        )
    return table


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        right = header.startswith(">")
        # Only the first column may fold: the layers of a name can be many, the numbers must stay whole.
        table.add_column(header.removeprefix(">"), justify="right" if right else "left", no_wrap=i > 0, overflow="fold")
    return table


def _grouped(tensors: Iterable[TensorReport]) -> list[list[TensorReport]]:
    groups: dict[object, list[TensorReport]] = {}
    for t in tensors:
        i = t.info
        _, suffix = _layer(i.name)
        groups.setdefault((suffix, i.shape, i.dtype, i.scales_shape, i.scales_dtype), []).append(t)
    return list(groups.values())


def _name(group: Sequence[TensorReport]) -> str:
    layer, suffix = _layer(group[0].info.name)
    if layer is None:
        return suffix
    layers = sorted(n for t in group if (n := _layer(t.info.name)[0]) is not None)
    return f"layers.{_spans(layers)}.{suffix}"


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


def _count(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)


def _size(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"


def _share(n: int, total: int) -> str:
    share = 100 * n / total
    return f"{share:.1f}%" if share >= 0.1 else "<0.1%"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}"
