"""`grok-engine bench kernels` and `bench list`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console

from ..environment import environment
from ..report import rows, table
from ..schema import KernelResult, ResultFile
from . import cases, contestant, harness, lineup, problems
from .case import Case
from .device import Device, device, known
from .entrant import Entrant, Local, Remote
from .harness import Lane, Work


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
@click.pass_context
def kernels_command(
    ctx: click.Context,
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
    where = device(name, small=smoke)
    console = table.terminal()
    limits = harness.Limits(seconds=seconds, call=limit)
    if smoke:
        limits = harness.Limits(seconds=60.0, rounds=2, call=limit, pick=False)
    race = Race(where, who, plugins, apart, limits, compiles=not (smoke or no_compile))
    command = shlex.join(["grok-engine", *(ctx.obj if isinstance(ctx.obj, list) else sys.argv[1:])])
    race.go(chosen, console, command, file, samples)
    ours = [s.status for r in race.results for s in r.scores if s.ours]
    bad = sum(status in rows.BAD for status in ours)
    counts = f"of ours {ours.count('ok')} ok, {bad} bad, {ours.count('missing')} missing"
    console.print(f"{len(race.results)} of {len(chosen)} problems; {counts}", markup=False)
    if race.interrupted:
        raise click.exceptions.Exit(130)
    if bad:
        raise click.exceptions.Exit(1)


def _selected(patterns: Sequence[str]) -> list[problems.Problem]:
    """The problems of the patterns, of which @SET is a set's."""
    found: list[str] = []
    for pattern in patterns:
        if pattern.startswith("@") and pattern[1:] not in problems.SETS:
            raise ValueError(f"{pattern!r} is no set of problems: expected @{', @'.join(problems.SETS)}")
        found += problems.SETS[pattern[1:]] if pattern.startswith("@") else [pattern]
    return problems.select(found)


@dataclass
class Race:
    """A run over many problems, saved after each."""

    where: Device
    who: Sequence[str]
    plugins: Sequence[str]
    apart: bool
    limits: harness.Limits
    compiles: bool = True
    results: list[KernelResult] = field(default_factory=list)
    interrupted: bool = False

    def go(
        self, chosen: Sequence[problems.Problem], console: Console, command: str, file: Path | None, samples: bool
    ) -> None:
        """Print and save the result of each as it comes."""
        about, skipped = environment(self.where.name), list[str]()

        def kept(interrupted: bool) -> ResultFile:
            return ResultFile(
                kind="kernels", command=command, environment=about, ceilings=self.where.kept(), results=self.results,
                interrupted=interrupted,
            )  # fmt: skip

        table.about(kept(False), console)
        try:
            for result in self._results(chosen, console, skipped):
                self.results.append(result)
                table.one(kept(True), result, console)
                if file:
                    kept(True).save(file, samples)  # so that the file holds what there is, whatever ends the run
        except KeyboardInterrupt as stop:
            self.interrupted = True
            if isinstance(stop, harness.Interrupted):
                self.results.append(stop.result)
                table.one(kept(True), stop.result, console)
            console.print("\ninterrupted: what was measured so far is kept")
        finally:
            cases.forget()
        if file and (self.results or not self.interrupted):
            kept(self.interrupted).save(file, samples)
        for line in skipped:
            console.print(f"skipped: {line}", markup=False)
        for names, why in rows.missing(kept(self.interrupted)):
            console.print(f"missing ({names}): {why}", markup=False, style="dim")

    def _results(
        self, chosen: Sequence[problems.Problem], console: Console, skipped: list[str]
    ) -> Iterator[KernelResult]:
        everyone = ("*",) if self.where.small else ()
        for problem in chosen:
            try:
                with torch.inference_mode():
                    case = cases.build(problem, self.where.name, self.where.cold, self.where.free())
            except cases.TooLarge as error:
                skipped.append(str(error))
                console.print(f"\nskipped: {error}", markup=False)
                continue
            found = contestant.entrants(problem, self.where.kind, self.who or everyone, self.compiles)
            work = Work(
                problem=problem.name,
                op=problem.op,
                parameters=dict(problem.parameters),
                operations=case.operations,
                bytes=case.bytes,
                arithmetic=case.arithmetic,
                tolerance=case.tolerance,
            )
            yield harness.run(work, [self._lane(problem, case, c) for c in found], self.where, self.limits)

    def _lane(self, problem: problems.Problem, case: Case, c: contestant.Contestant) -> Lane:
        size = case.bytes_of(c.weight_bytes) if case.weights else case.bytes
        return Lane(
            c.name,
            c.ours,
            partial(self._enter, problem, case, c),
            c.missing() or self._no_room(case, c),
            None if size == case.bytes else size,
            c.tolerance,
        )

    def _enter(self, problem: problems.Problem, case: Case, c: contestant.Contestant) -> Entrant:
        where, limit = self.where, self.limits.call
        if not self.apart:
            return Local(c, case, where, limit)
        task = lineup.Task(problem.name, where.small, c.name, where.name, self.plugins, limit)
        return Remote(lineup.enter, (task,), limit)

    def _no_room(self, case: Case, c: contestant.Contestant) -> str:
        need, free = case.stored * (c.weight_bytes or 0.0), self.where.free()
        if free is None or need <= free:
            return ""
        return f"its own copy needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are available on {self.where.name}"
