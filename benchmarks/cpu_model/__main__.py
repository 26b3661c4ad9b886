"""python -m benchmarks.cpu_model [--file FILE.gguf ...] [--peer NAME=COMMAND ...] [--dir DIR] [--kinds KIND ...]

A whole model beside llama.cpp and its forks, each reading the same GGUF file: files of the user's, or one random model
of Grok's architecture, 1.30 B parameters, in several types. A peer is the command of its `llama-batched-bench`, such as
`--peer 'ik=/path/llama-batched-bench -rtr'`; without one it is the package llama-cpp-python, in a process of its own.
The engines take turns in the harness of the kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.model_1b import configuration
from grok_bench.environment import environment
from grok_bench.kernels.device import Device
from grok_bench.kernels.entrant import Entrant
from grok_bench.kernels.harness import Lane, Limits, run
from grok_bench.report import table
from grok_bench.schema import KernelResult, ResultFile, Score
from grok_engine.config import ActFormat
from grok_engine.loading.resolve import read_config

from . import engines, llama, tool
from .llama import Load
from .models import Sizes, sizes, small_configuration, write_models

KINDS = ("Q8_0", "BF16", "Q4_K_S")
GET = "pip install llama-cpp-python '.[bench]', or --peer NAME=COMMAND"
PEER = "the llama-batched-bench of llama.cpp or of a fork, and its options: 'ik=PATH -rtr'"
CALL = 600.0  # seconds of a turn at most
ACTIVATIONS: tuple[ActFormat, ...] = ("none", "int8")


@dataclass(frozen=True)
class Peer:
    """`enter(file, load)` makes its entrant."""

    name: str
    version: str
    enter: Callable[[Path, Load], Entrant]


def bound() -> Peer:
    """llama.cpp through the bindings of llama-cpp-python."""
    return Peer(
        "llama.cpp",
        f"llama-cpp-python {version('llama-cpp-python')}",
        lambda file, load: engines.Apart(llama.Llama, file, load, limit=CALL),
    )


def program(text: str) -> Peer:
    """A peer as `--peer` names it."""
    name, equals, command = text.partition("=")
    if not (name and equals and command):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=COMMAND, the path of a llama-batched-bench")
    return Peer(name, tool.version(command), lambda file, load: tool.Tool(command, file, load, CALL))


def lanes(load: Load, file: Path, released: Path | None, peers: Sequence[Peer]) -> list[Lane]:
    """Who takes part under a load. `released`: the same model with the release's int8 weights, ours alone."""
    found = []
    for model, what in ((file, "grok-engine"), (released, "grok-engine, the release's int8")):
        for activations in ACTIVATIONS if model else ():
            name = what + (f", {activations} rows" if activations != "none" else "")
            enter = partial(engines.Apart, engines.Ours, model, activations, load, limit=CALL)
            found.append(Lane(Score(contestant=name, ours=True), enter))
    found += [Lane(Score(contestant=peer.name), partial(peer.enter, file, load)) for peer in peers]
    if not peers:
        missing = Score(contestant="llama.cpp", status="missing", message=f"llama.cpp is not installed: {GET}")
        found.append(replace(found[0], score=missing))
    return found


def problems(name: str, work: Sizes, new: int, small: bool) -> Iterator[tuple[KernelResult, Load]]:
    """What is timed: prefill, and decode of one and of more requests."""
    prompt, requests = (16, (1, 2)) if small else (512, (1, 4, 16))
    loads = [(f"prefill/t{prompt}", Load(1, prompt, 0)), *((f"decode/b{n}", Load(n, 16, new)) for n in requests)]
    for case, load in loads:
        result = KernelResult(
            problem=f"model/{name}/{case}", op="model", arithmetic="bf16", bytes=work.read(load.tokens),
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
    parser.add_argument("--kinds", nargs="*", default=KINDS, help="of the random model's files, by llama.cpp's names")
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
    quantizes = all(map(importlib.util.find_spec, ("llama_cpp", "gguf")))
    peers = a.peer or ([bound()] if quantizes else [])
    for peer in peers:
        console.print(f"{peer.name}: {peer.version}", highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        files, released = {path.stem: path for path in a.file}, None
        if not files:
            folder = a.dir or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            config = small_configuration() if a.smoke else configuration()
            written = write_models(folder, config, a.kinds if quantizes or a.peer else ())
            released = folder / "packed"
            files = {f"{config.name}-{kind}": path for kind, path in written.items()} or {config.name: released}
        for name, path in files.items():
            work = sizes(path, read_config(path))
            for problem, load in problems(name, work, 2 if a.smoke else a.new, a.smoke):
                if not any(fnmatchcase(problem.problem, f"*/{pattern}") for pattern in a.only):
                    continue
                problem.parameters.update({peer.name: peer.version for peer in peers})
                also = released if released != path and "Q8_0" in name else None
                entered = [
                    lane
                    for lane in lanes(load, path, also, peers)
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
    table.unavailable(file, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
