"""Problems that differ in one number only, as tokens: the lines of figures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..schema import KernelResult


@dataclass(frozen=True)
class Sweep:
    """Problems in the order of `xs`, the values of the parameter `over`; of a problem that stands alone, none."""

    name: str
    op: str
    over: str
    xs: list[float]
    results: list[KernelResult]


def sweeps(results: Sequence[KernelResult]) -> list[Sweep]:
    """Every result in exactly one, in the order in which they come."""
    found: list[Sweep] = []
    for op in dict.fromkeys(r.op for r in results):
        own = [r for r in results if r.op == op]
        over = _over(own)
        groups: dict[str, list[KernelResult]] = {}
        for r in own:
            rest = {k: v for k, v in r.parameters.items() if k != over or number(r.parameters, over) is None}
            groups.setdefault(json.dumps([r.family, rest], sort_keys=True), []).append(r)
        for group in groups.values():
            group.sort(key=lambda r: number(r.parameters, over) or 0.0)
            xs = [x for x in (number(r.parameters, over) for r in group) if x is not None]
            found.append(Sweep(common_name([r.problem for r in group]), op, over, xs, group))
    return found


def number(parameters: Mapping[str, object], name: str) -> float | None:
    value = parameters.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _over(results: Sequence[KernelResult]) -> str:
    """`tokens` where they differ, else the number that takes the most values; "" where none differs."""
    values: dict[str, set[float]] = {}
    for r in results:
        for name in r.parameters:
            value = number(r.parameters, name)
            if value is not None and value > 0:  # an axis of logarithms has no other
                values.setdefault(name, set()).add(value)
    if len(values.get("tokens", ())) > 1:
        return "tokens"
    most = max(values, key=lambda name: len(values[name]), default="")
    return most if most and len(values[most]) > 1 else ""


def common_name(names: Sequence[str]) -> str:
    """Of moe/grok-1/decode/fp8-t1 and moe/grok-1/decode/fp8-t16: moe/grok-1/decode/fp8. What differs amid is a star."""
    parts = [re.split("([-/])", name) for name in names]
    shortest = min(len(p) for p in parts)
    kept = [column[0] if len(set(column)) == 1 else "*" for column in zip(*(p[:shortest] for p in parts), strict=True)]
    while len(kept) > 1 and kept[-1] in ("*", "-", "/"):
        kept.pop()
    return "".join(kept)
