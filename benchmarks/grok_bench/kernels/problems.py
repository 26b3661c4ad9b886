"""Every problem by its name, without its data: OP/MODEL/PHASE/DETAILS, or OP/DETAILS for one of a plug-in's.

Any size is a problem; the listed sizes are those that patterns with * match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from itertools import product
from typing import TYPE_CHECKING, TypeVar

from grok_engine.config import ModelConfig

from .shapes import names, shape, smoke

if TYPE_CHECKING:
    from .case import Case

Value = int | str
Build = TypeVar("Build", bound=Callable[["Problem", str, int], "Case"])
TOKENS = tuple(2**i for i in range(15))  # 1 to 16384
DECODE = 256  # tokens of a step that only decodes, at most
CONTEXTS = tuple(2**i for i in range(7, 18))  # 128 to 131072
PAGES = (16, 64, 256)
KV = ("bf16", "fp8")
ROUTINGS = ("even", "zipf", "one")  # as many rows for each expert; by 1 / rank; all rows on one
SMALL = {"tokens": 4, "batch": 2, "queries": 4, "context": 256, "page": 16}  # the most in a smoke run; of others 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """The problems of one op that differ in the model and in the values of `axes`; the last axis varies fastest."""

    op: str
    details: str  # of the name, with the axes in braces
    axes: Mapping[str, Sequence[Value]]
    build: Callable[[Problem, str, int], Case]  # from a device, and bytes that successive calls go through
    phase: str = ""  # "" is decode up to DECODE tokens, and prefill above
    keep: Callable[[Mapping[str, Value]], bool] = lambda values: True
    footprint: Callable[[Problem], float] = lambda problem: 0.0  # bytes of its data
    modelled: bool = True  # whether a model decides its other sizes

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._listed(tuple(names()) if self.modelled else ("",)))

    @lru_cache(64)  # noqa: B019 - families live as long as the process
    def _listed(self, models: tuple[str, ...]) -> list[Problem]:
        every = (dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values()))
        kept = [tuple(named.items()) for named in every if self.keep(named)]
        return [Problem(self, model, values) for model in models for values in kept]

    def sized(self, pattern: str) -> Iterator[Problem]:
        """The problems of a pattern without * in its details, of whatever numbers."""
        op, *middle, details = pattern.split("/")
        found = re.fullmatch(self._details, details)
        if found is None or len(middle) != 2 * self.modelled or not fnmatchcase(self.op, op):
            return
        values = tuple((n, v if n in self.words else int(v)) for n, v in found.groupdict().items())
        if self.keep(dict(values)):
            models = [name for name in names() if fnmatchcase(name, middle[0])] or middle[:1] if middle else ("",)
            every = (Problem(self, model, values) for model in models)
            yield from (problem for problem in every if fnmatchcase(problem.name, pattern))

    @cached_property
    def words(self) -> set[str]:
        """The axes that are no numbers."""
        return {axis for axis, values in self.axes.items() if isinstance(values[0], str)}

    @cached_property
    def _details(self) -> str:
        """A regular expression of the details."""
        parts = re.split(r"\{(\w+)\}", self.details)
        for i, axis in enumerate(parts):
            values = "|".join(map(str, self.axes[axis])) if i % 2 and axis in self.words else "[1-9][0-9]*"
            parts[i] = f"(?P<{axis}>{values})" if i % 2 else re.escape(axis)
        return "".join(parts)


@dataclass(frozen=True)
class Problem:
    """One problem. `problem["tokens"]` is the value of an axis."""

    family: Family
    model: str  # "" for a problem that no model decides
    values: tuple[tuple[str, Value], ...]

    @property
    def op(self) -> str:
        return self.family.op

    @property
    def parameters(self) -> dict[str, Value]:
        return ({"model": self.model} if self.model else {}) | dict(self.values)

    @cached_property
    def name(self) -> str:
        values = dict(self.values)
        phase = self.family.phase or ("decode" if int(values.get("tokens", 0)) <= DECODE else "prefill")
        head = f"{self.op}/{self.model}/{phase}" if self.model else self.op
        return f"{head}/{self.family.details.format(**values)}"

    @property
    def shape(self) -> ModelConfig:
        return shape(self.model)

    def __getitem__(self, axis: str) -> Value:
        return dict(self.values)[axis]

    def number(self, axis: str) -> int:
        return int(self[axis])

    def small(self) -> Problem:
        """The same problem at a tiny size, for tests of the benchmark itself."""
        values = ((axis, min(v, SMALL.get(axis, 64)) if isinstance(v, int) else v) for axis, v in self.values)
        return Problem(self.family, smoke(self.model), tuple(values))

    def having(self, sizes: Mapping[str, Value]) -> Problem:
        """The same problem with other values of its axes, or of a model with other sizes."""
        values = tuple((axis, sizes.get(axis, v)) for axis, v in self.values)
        other = {name: v for name, v in sizes.items() if name not in dict(values)}
        model = ":".join([self.model, ",".join(f"{n}={v}" for n, v in other.items())]) if other else self.model
        return replace(self, model=model if self.model else "", values=values)


FAMILIES: list[Family] = []


def family(
    op: str, details: str, axes: Mapping[str, Sequence[Value]], *more: str, **options: object
) -> Callable[[Build], Build]:
    """Decorator: the function builds the problems of `op`, and of the ops `more`. `options`: members of `Family`."""

    def add(build: Build) -> Build:
        made = {"details": details, "axes": axes, "build": build, **options}
        FAMILIES.extend(Family(op=name, **made) for name in (op, *more))  # type: ignore[arg-type]
        return build

    return add


def ops() -> list[str]:
    return list(dict.fromkeys(family.op for family in FAMILIES))


def select(patterns: Sequence[str], sizes: Mapping[str, Value] | None = None) -> list[Problem]:
    """The problems that match any of the patterns (`*` also matches /), each once, in the order of the patterns.

    `sizes` replace values of axes and sizes of models. ValueError, with what there is, for a pattern or a size of which
    there is no problem.
    """
    found: dict[str, Problem] = {}
    sizes = sizes or {}
    for pattern in patterns or ("*",):
        op = pattern.split("/")[0]
        some = [f for f in FAMILIES if f.op == op] if re.fullmatch(r"\w+", op) and op != pattern else FAMILIES
        own = [p for f in some for p in f if fnmatchcase(p.name, pattern)] or [
            p for f in some for p in f.sized(pattern)
        ]
        if not own:
            raise ValueError(
                f"no problem matches {pattern!r}: names are OP/MODEL/PHASE/DETAILS, of ops {', '.join(ops())} and "
                f"models {', '.join(names())}; `grok-engine bench list` shows the rest"
            )
        found = {p.name: p for p in [*found.values(), *own]}
    for name, value in sizes.items():
        _check_size(name, value, list(found.values()))
    return list({p.name: p for p in (q.having(sizes) for q in found.values())}.values())


def _check_size(name: str, value: Value, chosen: Sequence[Problem]) -> None:
    """ValueError for a size that none of the problems has."""
    families = [p.family for p in chosen if name in p.family.axes]
    words = [str(v) for f in families if name in f.words for v in f.axes[name]]
    if words and value not in words:
        raise ValueError(f"--set {name}={value}: expected one of {', '.join(words)}")
    if families and not words and not (isinstance(value, int) and value > 0):
        raise ValueError(f"--set {name}={value}: expected a number above 0")
    modelled = [p for p in chosen if p.model]
    if not families and not (modelled and name in {f.name for f in fields(ModelConfig)}):
        axes = ", ".join(dict.fromkeys(axis for p in chosen for axis in p.family.axes))
        raise ValueError(f"--set {name}={value}: these problems have {axes}, and sizes of a model, as in d_model=512")


def parse_sizes(texts: Sequence[str]) -> dict[str, Value]:
    """NAME=VALUE as a dictionary. ValueError for anything else."""
    sizes: dict[str, Value] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not value:
            raise ValueError(f"--set {text!r}: expected NAME=VALUE, as in tokens=5")
        sizes[name] = int(value) if value.isdigit() else value
    return sizes


def overview() -> str:
    """A summary of all names: each family with the values of its axes."""
    lines = [f"MODEL   {' '.join(names())}", f"PHASE   decode (up to {DECODE} tokens) prefill", ""]
    for family in FAMILIES:
        head = f"{family.op}/MODEL/{family.phase or 'PHASE'}" if family.modelled else family.op
        lines.append(f"{head}/{family.details}   {sum(1 for _ in family):,} problems")
        lines += [f"    {axis:8} {' '.join(map(str, values))}" for axis, values in family.axes.items()]
    return "\n".join(lines)
