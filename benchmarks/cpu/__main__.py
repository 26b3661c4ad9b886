"""python -m benchmarks.cpu ['decode*' ...] [--list] [--threads N] [--seconds S] [--json FILE] [--smoke]"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from grok_bench.environment import environment

from . import run, select
from .harness import Result
from .machine import Machine
from .report import header, missing, result_file, show


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="The kernels on this CPU.")
    parser.add_argument("patterns", nargs="*", help="names of problems, with * and ?; all without")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; torch's own choice without")
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds, a problem")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two rounds: whether it runs, not how fast")
    a = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 120)
    try:
        problems = select(a.patterns)
    except ValueError as error:
        parser.error(str(error))
    if a.list:
        for problem in problems:
            print(problem.name)
        return 0
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    machine, about = Machine(small=a.smoke), environment()
    console.print(header(about, machine), highlight=False)
    results: list[Result] = []
    command = shlex.join(["python", "-m", "benchmarks.cpu", *(sys.argv[1:] if arguments is None else arguments)])

    def save(interrupted: bool) -> None:
        if a.json:
            result_file(command, about, machine, results, interrupted).save(a.json)

    if a.smoke:
        problems = list({problem.small().name: problem.small() for problem in problems}.values())
    try:
        for problem in problems:
            result = run(problem, machine, a.seconds, most=2 if a.smoke else 200, pick=not a.smoke)
            show(console, result)
            results.append(result)
            save(interrupted=True)  # after each: whatever ends the run, the file holds what it has
    except KeyboardInterrupt:
        console.print("\ninterrupted: what was measured so far is kept", highlight=False)
        return 130
    save(interrupted=False)
    console.print("\n" + missing(results), highlight=False, markup=False)
    return int(any(score.wrong or score.failed for result in results for score in result.scores if score.ours))


if __name__ == "__main__":
    raise SystemExit(main())
