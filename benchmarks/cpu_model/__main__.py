"""python -m benchmarks.cpu_model [--file FILE.gguf ...] [--peer NAME=COMMAND ...] [--dir DIR] [--kinds KIND ...]

A whole model beside llama.cpp and its forks, each reading the same GGUF file: files of the user's, or one random model
of Grok's architecture, 1.30 B parameters, in several types. A peer is the command of its `llama-batched-bench`, such as
`--peer 'ik=/path/llama-batched-bench -rtr'`. The engines take turns in the harness of the kernels.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch

from benchmarks.model_1b import configuration
from grok_bench.environment import environment
from grok_bench.kernels.device import Device
from grok_bench.kernels.harness import Lane, Limits, run
from grok_bench.report import table
from grok_bench.schema import KernelResult, ResultFile, Score
from grok_engine.config import ActFormat
from grok_engine.loading.resolve import read_config

from .engines import Apart, Load, Ours
from .models import KINDS, Sizes, sizes, small_configuration, write_models
from .tool import Tool, version

PEER = "the llama-batched-bench of llama.cpp or of a fork, and its options: 'ik=PATH -rtr'"
CALL = 600.0  # seconds of a turn at most
ACTIVATIONS: tuple[ActFormat, ...] = ("none", "int8")


@dataclass(frozen=True)
class Peer:
    """A program that measures itself, as `--peer` gives it."""

    name: str
    command: str
    version: str


def program(text: str) -> Peer:
    name, equals, command = text.partition("=")
    if not (name and equals and command):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=COMMAND, the path of a llama-batched-bench")
    return Peer(name, command, version(command))


def lanes(load: Load, file: Path, released: Path | None, peers: Sequence[Peer]) -> list[Lane]:
    """Who takes part under a load. `released`: the same model with the release's int8 weights, ours alone."""
    found = []
    for model, what in ((file, "grok-engine"), (released, "grok-engine, the release's int8")):
        for activations in ACTIVATIONS if model else ():
            name = what + (f", {activations} rows" if activations != "none" else "")
            enter = partial(Apart, Ours, model, activations, load, limit=CALL)
            found.append(Lane(Score(contestant=name, ours=True), enter))
    found += [Lane(Score(contestant=p.name), partial(Tool, p.command, file, load, CALL)) for p in peers]
    return found


def problems(name: str, work: Sizes, new: int, small: bool) -> Iterator[tuple[KernelResult, Load]]:
    """What is timed: prefill, and decode of one and of more requests."""
    prompt, requests = (16, (1, 2)) if small else (512, (1, 4, 16))
    loads = [(f"prefill/t{prompt}", Load(1, prompt, 0)), *((f"decode/b{n}", Load(n, 16, new)) for n in requests)]
    for case, load in loads:
        # int8: peers round rows to 8 bits, and ours may
        result = KernelResult(
            problem=f"model/{name}/{case}", op="model", arithmetic="int8", bytes=work.read(load.tokens),
            operations=2.0 * (work.layers * load.tokens + work.head * load.requests),
            parameters={"tokens": load.tokens, "weights": work.formats},
        )  # fmt: skip
        yield result, load


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_model", description="A whole model on this CPU.")
    parser.add_argument("--file", type=Path, nargs="*", default=(), help="GGUF files, instead of the random model")
    parser.add_argument("--peer", type=program, action="append", default=[], metavar="NAME=COMMAND", help=PEER)
    parser.add_argument("--only", nargs="*", default=("*",), help="problems, such as 'decode/*'")
    parser.add_argument("--contestant", nargs="*", default=("*",), help="who takes part, such as 'ik' 'grok-engine*'")
    parser.add_argument("--dir", type=Path, help="write the models there and keep them; a temporary folder without")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS, help="of the random model's files")
    parser.add_argument("--rounds", type=int, default=20, help="at most, of each problem")
    parser.add_argument("--seconds", type=float, default=90.0, help="of rounds, of each problem")
    parser.add_argument("--new", type=int, default=16, help="tokens decoded by each request")
    parser.add_argument("--threads", type=int, help="of both engines; torch's default without")
    parser.add_argument("--keep", action="store_true", help="keep disturbed rounds, on a machine that is never quiet")
    parser.add_argument("--json", type=Path, help="write a summary there")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round: whether it runs, not how fast")
    a = parser.parse_args(arguments)
    if a.threads:
        torch.set_num_threads(a.threads)
    limits = Limits(60.0, 1, CALL, pick=False) if a.smoke else Limits(a.seconds, a.rounds, CALL, pick=not a.keep)
    machine, console, results = Device(small=a.smoke), table.terminal(), list[KernelResult]()
    command = shlex.join(["python", "-m", "benchmarks.cpu_model", *(sys.argv[1:] if arguments is None else arguments)])
    file = ResultFile(
        kind="kernels", command=command, environment=environment(), results=results, ceilings=machine.kept()
    )
    table.about(file, console)
    if not a.peer:
        console.print(f"no peer: --peer takes {PEER}", markup=False)
    for peer in a.peer:
        console.print(f"{peer.name}: {peer.version}", highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        files, released = {path.stem: path for path in a.file}, None
        if not files:
            folder = a.dir or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            config = small_configuration() if a.smoke else configuration()
            files = {f"{config.name}-{kind}": path for kind, path in write_models(folder, config, a.kinds).items()}
            released = folder / "packed"
        for name, path in files.items():
            work = sizes(path, read_config(path))
            for problem, load in problems(name, work, 2 if a.smoke else a.new, a.smoke):
                if not any(fnmatchcase(problem.problem, f"*/{pattern}") for pattern in a.only):
                    continue
                problem.parameters.update({peer.name: peer.version for peer in a.peer})
                also = released if "Q8_0" in name else None
                entered = [
                    lane
                    for lane in lanes(load, path, also, a.peer)
                    if any(fnmatchcase(lane.score.contestant, pattern) for pattern in a.contestant)
                ]
                result = run(problem, entered, machine, limits)
                results.append(result)
                table.one(result, console)
                for lane, score in zip(entered, result.scores, strict=True):
                    if score.seconds:
                        peak = f", {lane.entrant.peak / 1e6:,.0f} MB at the peak" if lane.entrant else ""
                        rate = f"{load.tokens / score.seconds:,.1f} tokens/s"
                        console.print(f"{score.contestant}: {rate}{peak}", style="dim")
                if a.json:
                    file.save(a.json)
    table.summary(file, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
