"""`grok-engine bench kernels` and `bench list`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from math import inf
from pathlib import Path

import click
import torch

from ..environment import command, environment
from ..report import rows, table
from ..schema import KernelResult, ResultFile, Score
from . import cases, contestant, harness, lineup, problems, quiet, sets, trace
from .case import Case
from .data import forget
from .device import Device, device, known
from .entrant import Dropped, Local, Remote

FILE = click.Path(dir_okay=False, path_type=Path)
PLUGIN = click.option(
    "--plugin", "plugins", multiple=True, type=click.Path(exists=True), metavar="PATH",
    help="A Python file with contestants, problems, models; or a folder of FlashInfer-Trace.",
)  # fmt: skip
SET = click.option("--set", "sizes", multiple=True, metavar="NAME=VALUE", help="Another size: tokens=5, d_model=512.")


@click.command(name="list")
@click.argument("patterns", nargs=-1)
@PLUGIN
@SET
def list_command(patterns: tuple[str, ...], plugins: tuple[str, ...], sizes: tuple[str, ...]) -> None:
    """The names of the problems that match PATTERNS, or, without any, how names are made and of what."""
    lineup.load(plugins)
    if patterns:
        click.echo("\n".join(p.name for p in _selected(patterns, sizes)))
    else:
        click.echo(problems.overview())
        for name, chosen in sets.SETS.items():
            click.echo(f"@{name}   {len(problems.select(chosen))} of them")


@click.command(name="kernels")
@click.argument("patterns", nargs=-1)
@click.option("--device", "name", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--contestant", "who", multiple=True, metavar="PATTERN", help="Only those whose names match.")
@PLUGIN
@SET
@click.option(
    "--subject",
    multiple=True,
    metavar="PATTERN",
    help="Whom to measure against the rest.  [default: a plug-in's contestants; without one grok_kernels]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of a CPU; torch's default without.")
@click.option("--seconds", type=click.FloatRange(min=0), default=4.0, show_default=True, help="Of rounds, a problem.")
@click.option(
    "--limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, help="Of a call."
)
@click.option("--cap", type=click.FloatRange(min=0, min_open=True), help="Seconds of the whole run, at most.")
@click.option("--subprocess", "apart", is_flag=True, help="Each contestant in a process that may crash or hang.")
@click.option("--no-compile", is_flag=True, help="Without contestants that take seconds to compile.")
@click.option("--smoke", is_flag=True, help="Tiny sizes, two rounds: whether it runs, not how fast.")
@click.option("--json", "file", type=FILE, help="Write a summary there.")
@click.option("--samples", is_flag=True, help="With --json: write every sample, too.")
@click.option("--csv", "csv", type=FILE, help="Write a line for each contestant at each problem there.")
@click.option(
    "--trace", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write FlashInfer-Trace there."
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def kernels_command(
    patterns: tuple[str, ...],
    name: str,
    who: tuple[str, ...],
    plugins: tuple[str, ...],
    sizes: tuple[str, ...],
    subject: tuple[str, ...],
    threads: int | None,
    seconds: float,
    limit: float,
    cap: float | None,
    apart: bool,
    no_compile: bool,
    smoke: bool,
    file: Path | None,
    samples: bool,
    csv: Path | None,
    folder: Path | None,
) -> None:
    """The subject beside all others at the problems that match PATTERNS, or at the device's default set.

    `grok-engine bench list` shows the names; * matches anything, and @cpu, @cuda, @quick stand for a set. Status 1
    where something of the subject is wrong, fails or hangs, 130 after Ctrl-C.
    """
    end = time.perf_counter() + cap if cap else inf
    kind = known(name).split(":")[0]
    plugged = lineup.load(plugins)
    mine = subject or plugged or ("grok_kernels*",)
    chosen = _selected(patterns or (f"@{kind}",), sizes)
    if threads:
        torch.set_num_threads(threads)
    if smoke:
        chosen = list({p.small().name: p.small() for p in chosen}.values())
    for these in (who, subject):
        contestant.check(these, chosen, kind)
    limits = harness.Limits(seconds=seconds, call=limit, end=end)
    if smoke:
        limits = replace(limits, seconds=60.0, rounds=2, pick=False)
    busy = [] if smoke else quiet.load(environment().cores)
    where, console = device(name, small=smoke), table.terminal()
    results = list[KernelResult]()
    found = ResultFile(kind="kernels", command=command(), environment=environment(where.name), results=results)
    found.ceilings.update(where.kept())
    found.warnings.extend(busy + ([] if smoke else quiet.below(where.kept(), found.environment)))
    table.about(found, console)

    def keep(result: KernelResult) -> None:
        results.append(result)
        found.ceilings.update(where.kept())
        table.one(result, console)
        if file:  # after each, so that the file holds what there is, whatever ends the run
            found.save(file, samples)
        if csv:
            csv.write_text(rows.as_csv([found]), encoding="utf-8")

    skipped = list[str]()
    try:
        for problem in chosen:
            try:
                with torch.inference_mode():
                    case = cases.build(problem, where.name, where.cold, where.free(), end)
            except Dropped as error:
                skipped.append(f"skipped: {problem.name}: {error.args[1]}")
                console.print(f"\n{skipped[-1]}", markup=False)
                continue
            everyone = contestant.entrants(problem, kind, who or ("*",) * smoke, compiles=not (smoke or no_compile))
            enter = partial(_lane, problem, case, where, limits, mine, plugins if apart else None)
            switches = quiet.Switches()
            work = KernelResult(
                problem=problem.name, op=problem.op, parameters=dict(problem.parameters), operations=case.operations,
                bytes=case.bytes, arithmetic=case.arithmetic, tolerance=case.tolerance,
            )  # fmt: skip
            result = harness.run(work, [enter(c) for c in everyone], where, limits)
            keep(replace(result, warnings=result.warnings + ([] if smoke else switches.warning())))
            if folder:
                trace.write(folder, problem, case, everyone)
    except KeyboardInterrupt as stop:
        found = replace(found, interrupted=True)
        if isinstance(stop, harness.Interrupted):
            keep(stop.result)
        elif file and results:
            found.save(file, samples)
        console.print("\ninterrupted: what was measured so far is kept")
    finally:
        forget()
    for line in skipped:
        console.print(line, markup=False)
    table.summary(found, console)
    if found.interrupted or any(s.ours and s.status in rows.BAD for r in results for s in r.scores):
        raise click.exceptions.Exit(130 if found.interrupted else 1)


def _selected(patterns: Sequence[str], sizes: Sequence[str] = ()) -> list[problems.Problem]:
    """The problems of the patterns, of which @SET is a set's."""
    found: list[str] = []
    for pattern in patterns:
        if pattern.startswith("@") and pattern[1:] not in sets.SETS:
            raise ValueError(f"{pattern!r} is no set of problems: expected @{', @'.join(sets.SETS)}")
        found += sets.SETS[pattern[1:]] if pattern.startswith("@") else [pattern]
    return problems.select(found, problems.parse_sizes(sizes))


def _lane(
    problem: problems.Problem, case: Case, where: Device, limits: harness.Limits, mine: Sequence[str],
    plugins: Sequence[str] | None, c: contestant.Contestant,
) -> harness.Lane:  # fmt: skip
    """A contestant's way through a problem: in this process, or with `plugins` in one of its own."""
    size = case.bytes_of(c.weight_bytes) if case.weights else case.bytes
    why, need, free = c.missing(), case.stored * (c.weight_bytes or 0.0), where.free()
    if not why and free is not None and need > free:
        why = f"its own copy needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are available on {where.name}"
    score = Score(
        contestant=c.name, ours=any(fnmatchcase(c.name, pattern) for pattern in mine),
        status="missing" if why else "ok", message=why, tolerance=c.tolerance,
        bytes=None if size == case.bytes else size,
    )  # fmt: skip
    if plugins is None:
        return harness.Lane(score, partial(Local, c, case, where, limits.call, limits.end))
    task = (problem.name, c.name, where.name, where.small, plugins, limits.call)
    return harness.Lane(score, partial(Remote, lineup.enter, task, limits.call, limits.end))
