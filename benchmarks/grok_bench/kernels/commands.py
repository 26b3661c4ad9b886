"""`grok-engine bench kernels` and `bench list`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console

from ..environment import environment
from ..report import rows, table
from ..schema import KernelResult, ResultFile
from . import cases, contestant, harness, problems
from .case import Case
from .device import Device, device, known
from .entrant import Entrant, Local, Remote, Task


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
@click.option(
    "--plugin", "plugins", multiple=True, type=click.Path(exists=True, dir_okay=False), help="A file of contestants."
)
@click.option("--threads", type=click.IntRange(min=1), help="Of a CPU; torch's own choice without.")
@click.option("--seconds", type=click.FloatRange(min=0), default=4.0, show_default=True, help="Of rounds, a problem.")
@click.option(
    "--limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, help="Seconds of a call."
)
@click.option("--subprocess", "apart", is_flag=True, help="Each contestant in a process that may crash or hang.")
@click.option("--no-compile", is_flag=True, help="Without contestants that take seconds to compile.")
@click.option("--smoke", is_flag=True, help="Tiny sizes, two rounds: whether it runs, not how fast.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results there.")
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
) -> None:
    """Our kernels beside other people's at the problems that match PATTERNS, or at the device's own choice of them.

    `grok-engine bench --list` shows the names; * matches anything, and @cpu, @cuda, @quick stand for a choice. Status 1
    where something of ours is wrong, fails or hangs, 130 after Ctrl-C.
    """
    kind = known(name).split(":")[0]
    contestant.load(plugins)
    chosen = _selected(patterns or (f"@{kind}",))
    if threads:
        torch.set_num_threads(threads)
    if smoke:
        chosen = list({p.small().name: p.small() for p in chosen}.values())
    contestant.check(who, chosen, kind)
    where = device(name, small=smoke)
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    limits = harness.Limits(seconds=seconds, call=limit)
    if smoke:
        limits = harness.Limits(seconds=60.0, rounds=2, call=limit, pick=False)
    race = Race(where, who, plugins, apart, limits, compiles=not (smoke or no_compile))
    command = shlex.join(["grok-engine", *(ctx.obj if isinstance(ctx.obj, list) else sys.argv[1:])])
    race.go(chosen, console, command, file)
    ours = [s.status for r in race.results for s in r.scores if s.ours]
    bad = sum(status in ("wrong", "failed", "timeout") for status in ours)
    counts = f"of ours {ours.count('ok')} ok, {bad} bad, {ours.count('missing')} missing"
    console.print(f"{len(race.results)} of {len(chosen)} problems; {counts}", markup=False)
    if race.interrupted:
        raise click.exceptions.Exit(130)
    if bad:
        raise click.exceptions.Exit(1)


def _selected(patterns: Sequence[str]) -> list[problems.Problem]:
    """With @SET for the patterns of a set."""
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

    def __post_init__(self) -> None:
        self.results: list[KernelResult] = []
        self.skipped: list[str] = []
        self.interrupted = False

    def go(self, chosen: Sequence[problems.Problem], console: Console, command: str, file: Path | None) -> None:
        """Print and save the result of each as it comes."""
        about = environment(self.where.name)

        def kept(interrupted: bool) -> ResultFile:
            return ResultFile(
                kind="kernels", command=command, environment=about, ceilings=self.where.kept(), results=self.results,
                interrupted=interrupted,
            )  # fmt: skip

        table.about(kept(False), console)
        try:
            for result in self._results(chosen, console):
                self.results.append(result)
                table.one(kept(True), result, console)
                if file:
                    kept(True).save(file)  # whatever ends the run, the file holds what it has
        except KeyboardInterrupt as stop:
            self.interrupted = True
            if isinstance(stop, harness.Interrupted):
                self.results.append(stop.result)
                table.one(kept(True), stop.result, console)
            console.print("\ninterrupted: what was measured so far is kept")
        finally:
            cases.forget()
        if file and (self.results or not self.interrupted):
            kept(self.interrupted).save(file)
        for line in self.skipped:
            console.print(f"skipped: {line}", markup=False)
        for names, why in rows.missing(kept(self.interrupted)):
            console.print(f"missing ({names}): {why}", markup=False, style="dim")

    @property
    def _default(self) -> Sequence[str]:
        return ("*",) if self.where.small else ()

    def _results(self, chosen: Sequence[problems.Problem], console: Console) -> Iterator[KernelResult]:
        for problem in chosen:
            everyone = contestant.entrants(problem, self.where.kind, self.who or self._default, self.compiles)
            try:
                with torch.inference_mode():
                    case = cases.build(problem, self.where.name, self.where.cold, self.where.free())
            except cases.TooLarge as error:
                self.skipped.append(str(error))
                console.print(f"\nskipped: {error}", markup=False)
                continue
            yield harness.run(problem, case, everyone, self.where, partial(self._enter, problem, case), self.limits)

    def _enter(self, problem: problems.Problem, case: Case, c: contestant.Contestant) -> Entrant:
        if not self.apart:
            return Local(c, case, self.where, self.limits.call)
        return Remote(
            Task(
                problem.name, self.where.small, c.name, self.where.name, torch.get_num_threads(), self.plugins,
                self.limits.call,
            )
        )  # fmt: skip
