"""`grok-engine bench kernels` and `bench list`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch

from ..environment import command, environment
from ..report import rows, table
from ..schema import KernelResult, ResultFile, Score
from . import cases, contestant, harness, lineup, problems
from .case import Case
from .data import forget
from .device import Device, device, known
from .entrant import Local, Remote


@click.command(name="list")
@click.argument("patterns", nargs=-1)
def list_command(patterns: tuple[str, ...]) -> None:
    """The names of the problems that match PATTERNS, or, without any, how names are made and of what."""
    if patterns:
        click.echo("\n".join(p.name for p in _selected(patterns)))
    else:
        click.echo(problems.overview())
        for name, chosen in problems.SETS.items():
            click.echo(f"@{name}   {len(problems.select(chosen))} of them")


@click.command(name="kernels")
@click.argument("patterns", nargs=-1)
@click.option("--device", "name", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--contestant", "who", multiple=True, metavar="PATTERN", help="Only those whose names match.")
@click.option("--plugin", "plugins", multiple=True, type=click.Path(exists=True, dir_okay=False), help="Contestants.")
@click.option("--threads", type=click.IntRange(min=1), help="Of a CPU; torch's default without.")
@click.option("--seconds", type=click.FloatRange(min=0), default=4.0, show_default=True, help="Of rounds, a problem.")
@click.option(
    "--limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, help="Of a call."
)
@click.option("--subprocess", "apart", is_flag=True, help="Each contestant in a process that may crash or hang.")
@click.option("--no-compile", is_flag=True, help="Without contestants that take seconds to compile.")
@click.option("--smoke", is_flag=True, help="Tiny sizes, two rounds: whether it runs, not how fast.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write a summary there.")
@click.option("--samples", is_flag=True, help="With --json: write every sample, too.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def kernels_command(
    patterns: tuple[str, ...],
    name: str,
    who: tuple[str, ...],
    plugins: tuple[str, ...],
    threads: int | None,
    seconds: float,
    limit: float,
    apart: bool,
    no_compile: bool,
    smoke: bool,
    file: Path | None,
    samples: bool,
) -> None:
    """Our kernels beside other people's at the problems that match PATTERNS, or at the device's default set.

    `grok-engine bench list` shows the names; * matches anything, and @cpu, @cuda, @quick stand for a set. Status 1
    where something of ours is wrong, fails or hangs, 130 after Ctrl-C.
    """
    kind = known(name).split(":")[0]
    lineup.load(plugins)
    chosen = _selected(patterns or (f"@{kind}",))
    if threads:
        torch.set_num_threads(threads)
    if smoke:
        chosen = list({p.small().name: p.small() for p in chosen}.values())
    contestant.check(who, chosen, kind)
    where, console = device(name, small=smoke), table.terminal()
    limits = harness.Limits(60.0, 2, limit, pick=False) if smoke else harness.Limits(seconds=seconds, call=limit)
    results = list[KernelResult]()
    found = ResultFile(kind="kernels", command=command(), environment=environment(where.name), results=results)
    found.ceilings.update(where.kept())
    table.about(found, console)

    def keep(result: KernelResult) -> None:
        results.append(result)
        found.ceilings.update(where.kept())
        table.one(found, result, console)
        if file:  # after each, so that the file holds what there is, whatever ends the run
            found.save(file, samples)

    skipped = list[str]()
    try:
        for problem in chosen:
            try:
                with torch.inference_mode():
                    case = cases.build(problem, where.name, where.cold, where.free())
            except cases.TooLarge as error:
                skipped.append(str(error))
                console.print(f"\nskipped: {error}", markup=False)
                continue
            everyone = contestant.entrants(problem, kind, who or ("*",) * smoke, compiles=not (smoke or no_compile))
            lanes = [_lane(c, problem, case, where, limit, plugins if apart else None) for c in everyone]
            keep(harness.run(cases.work(problem, case), lanes, where, limits))
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
        console.print(f"skipped: {line}", markup=False)
    for names, why in rows.missing(found):
        console.print(f"missing ({names}): {why}", markup=False, style="dim")
    ours = [s.status for r in results for s in r.scores if s.ours]
    bad = sum(status in rows.BAD for status in ours)
    counts = f"of ours {ours.count('ok')} ok, {bad} bad, {ours.count('missing')} missing"
    console.print(f"{len(results)} of {len(chosen)} problems; {counts}", markup=False)
    if found.interrupted or bad:
        raise click.exceptions.Exit(130 if found.interrupted else 1)


def _selected(patterns: Sequence[str]) -> list[problems.Problem]:
    """The problems of the patterns, of which @SET is a set's."""
    found: list[str] = []
    for pattern in patterns:
        if pattern.startswith("@") and pattern[1:] not in problems.SETS:
            raise ValueError(f"{pattern!r} is no set of problems: expected @{', @'.join(problems.SETS)}")
        found += problems.SETS[pattern[1:]] if pattern.startswith("@") else [pattern]
    return problems.select(found)


def _lane(
    c: contestant.Contestant, problem: problems.Problem, case: Case, where: Device, limit: float,
    plugins: Sequence[str] | None,
) -> harness.Lane:  # fmt: skip
    """A contestant's lane, in this process, or with `plugins` in one of its own."""
    size = case.bytes_of(c.weight_bytes) if case.weights else case.bytes
    why, need, free = c.missing(), case.stored * (c.weight_bytes or 0.0), where.free()
    if not why and free is not None and need > free:
        why = f"its own copy needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are available on {where.name}"
    score = Score(
        contestant=c.name, ours=c.ours, status="missing" if why else "ok", message=why, tolerance=c.tolerance,
        bytes=None if size == case.bytes else size,
    )  # fmt: skip
    if plugins is None:
        return harness.Lane(score, partial(Local, c, case, where, limit))
    task = lineup.Task(problem.name, where.small, c.name, where.name, plugins, limit)
    return harness.Lane(score, partial(Remote, lineup.enter, (task,), limit))
