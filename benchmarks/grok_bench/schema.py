"""The result file that every benchmark of the suite writes and every report reads: "grok-bench/2", JSON.

A file is a summary: medians with 95% intervals, counts, ratios, ceilings and the environment. Samples are written only
where they are asked for. Times are seconds, sizes bytes, rates per second. A missing value is null or left out, never
NaN or infinite; a member that equals its default is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from datetime import datetime, timezone
from inspect import formatannotation
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

SCHEMA = "grok-bench/2"
Scalar: TypeAlias = str | int | float | bool | None
# "noisy": right, but the machine was too busy for a time; neither a failure nor a regression
Status = Literal["ok", "noisy", "wrong", "failed", "missing", "timeout"]


class SchemaError(ValueError):
    """A file that is not a result file, or not one of this schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The machine and the software that a number depends on."""

    chip: str
    device: Literal["cpu", "cuda"]
    cores: int
    threads: int
    isa: str | None  # of the native CPU kernels; None where they were not built
    clock_mhz: float | None
    driver: str | None
    python: str
    torch: str
    triton: str | None
    compiler: str | None
    os: str
    commit: str | None
    dirty: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The best measured rate of this machine: bytes read or copied, or operations of one arithmetic."""

    unit: Literal["B/s", "FLOP/s"]
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One contestant on one problem.

    `seconds` is the median over the problem's rounds and `low`, `high` its 95% interval; None unless "ok".
    `speedup` is the median over rounds of (best peer's time / own time), with its 95% interval.
    """

    contestant: str
    ours: bool = False  # of the subject, which is measured against the others
    status: Status = "ok"
    message: str = ""
    error: float | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    roofline: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    bytes: float | None = None  # what it reads and writes, where that differs from the problem's
    tolerance: float | None = None  # of the error, where that differs from the problem's
    samples: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """A GPU during the rounds of one problem: medians, extremes where the name says so, and the highest temperature.

    `held_back` is the share of readings in which power or heat kept the clock down.
    """

    watts: float
    most_watts: float
    limit_watts: float
    clock_mhz: float
    least_clock_mhz: float
    celsius: float
    held_back: float
    readings: int

    @property
    def fell(self) -> str:
        """A warning, if the clock fell during the rounds; else empty."""
        if self.least_clock_mhz >= 0.95 * self.clock_mhz:
            return ""
        return f"the clock fell to {self.least_clock_mhz:.0f} MHz, from {self.clock_mhz:.0f} as a rule"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """One problem. `floor_seconds` is the roofline's: bytes over the memory ceiling, or operations over the peak's."""

    problem: str
    op: str
    parameters: dict[str, Scalar]
    operations: float
    bytes: float
    arithmetic: str
    tolerance: float | None = None
    floor_seconds: float | None = None
    rounds: int = 0
    thrown_away: int = 0
    best_peer: str | None = None
    scores: list[Score] = field(default_factory=list)
    gpu: GpuState | None = None
    warnings: list[str] = field(default_factory=list)  # what disturbed these rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of one latency over all requests (of `itl`, over all pairs of neighbouring tokens).

    `low`, `high`: the 95% interval of p50.
    """

    mean: float
    p50: float
    p90: float
    p99: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """One run of the engine. `metrics` has ttft, itl, tpot and e2e; None where no request had such a time."""

    protocol: Literal["latency", "throughput", "serve"]
    model: str
    parameters: dict[str, Scalar]
    duration_seconds: float
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    goodput_per_second: float | None = None
    slo: dict[str, float] | None = None
    metrics: dict[str, Percentiles | None]
    load_seconds: float | None = None  # with peak_memory_bytes: None of a server, where neither is known
    peak_memory_bytes: int | None = None


KINDS = {"kernels": KernelResult, "engine": EngineResult}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFile:
    """A file: where, how and when it was measured, and results of one kind."""

    kind: Literal["kernels", "engine"]
    command: str
    environment: Environment
    results: list[KernelResult] | list[EngineResult]
    ceilings: dict[str, Ceiling] = field(default_factory=dict)
    interrupted: bool = False
    warnings: list[str] = field(default_factory=list)  # what makes the whole file doubtful
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))

    @property
    def kernels(self) -> list[KernelResult]:
        return [r for r in self.results if isinstance(r, KernelResult)]

    @property
    def runs(self) -> list[EngineResult]:
        return [r for r in self.results if isinstance(r, EngineResult)]

    def save(self, path: str | Path, samples: bool = False) -> None:
        """Write the whole file or none of it: a line for each member and each result, to be compared line by line."""
        path = Path(path)
        values = {"schema": SCHEMA, **_plain(self, samples)}
        members = [f"{_json(name)}: {_json(value)}" for name, value in values.items() if name != "results"]
        members.append('"results": [\n' + ",\n".join(map(_json, values["results"])) + "]")
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text("{" + ",\n".join(members) + "}\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _plain(value: Any, samples: bool) -> Any:
    """`value` as JSON has it, without members that equal their default, and without samples unless they are wanted."""
    if isinstance(value, list):
        return [_plain(item, samples) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, samples) for key, item in value.items()}
    if not is_dataclass(value):
        return value
    members = {f.name: getattr(value, f.name) for f in fields(value) if samples or f.name != "samples"}
    defaults: dict[str, Any] = {f.name: f.default for f in fields(value)}
    defaults |= {f.name: f.default_factory() for f in fields(value) if f.default_factory in (list, dict)}
    return {name: _plain(member, samples) for name, member in members.items() if member != defaults[name]}


def load(path: str | Path) -> ResultFile:
    """Read a result file. SchemaError names the file, the place in it, and what was expected there."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)
    except ValueError as error:
        raise SchemaError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise SchemaError(f"{path} cannot be read: {error.strerror or error}") from None
    found = values.pop("schema", None) if isinstance(values, dict) else None
    if found != SCHEMA:
        raise SchemaError(f"{path} has schema {found!r}, expected {SCHEMA!r}")
    hints = get_type_hints(ResultFile)
    try:
        kind = KINDS[_parse(hints["kind"], values.get("kind"), "kind")]
        hints["results"] = list[kind]  # type: ignore[valid-type]
        read: ResultFile = _members(ResultFile, values, hints, "")
        return read
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number in JSON")


def _members(cls: type, values: Any, hints: Mapping[str, Any], at: str) -> Any:
    if not isinstance(values, dict):
        raise SchemaError(f"{at} is {values!r:.60}, expected an object")
    names = [f.name for f in fields(cls)]
    optional = [f.name for f in fields(cls) if not (f.default is MISSING and f.default_factory is MISSING)]
    for what, some in (
        ("lacks", [name for name in names if name not in values and name not in optional]),
        ("has unknown", [name for name in values if name not in names]),
    ):
        if some:
            raise SchemaError(f"{at or 'the file'} {what} {', '.join(some)}")
    return cls(**{name: _parse(hints[name], value, f"{at}.{name}".lstrip(".")) for name, value in values.items()})


def _parse(kind: Any, value: Any, at: str) -> Any:
    """`value`, as JSON has it, as the annotation says."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _members(kind, value, get_type_hints(kind), at)  # type: ignore[arg-type]
    if origin is UnionType:  # of scalars, or of one type and None
        options = [option for option in args if option is not NoneType]
        if type(value) in args:
            return value
        if len(options) == 1:
            return _parse(options[0], value, at)
    elif origin is Literal and value in args:
        return value
    elif origin is list and isinstance(value, list):
        return [_parse(args[0], item, f"{at}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {key: _parse(args[1], item, f"{at}.{key}") for key, item in value.items()}
    elif type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    raise SchemaError(f"{at} is {value!r:.60}, expected {formatannotation(kind)}")
