"""python -m benchmarks.cpu_model [--dir DIR] [--kinds KIND ...] [--rounds N] [--threads N] [--json FILE] [--smoke]

One random model of Grok's architecture, 1.30 B parameters, as a checkpoint in the release's format and as GGUF with the
same values, so that both engines do the same work. The engines take turns in the harness of the kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.model_1b import configuration, write
from grok_bench.environment import environment
from grok_bench.kernels.device import Device
from grok_bench.kernels.entrant import Remote
from grok_bench.kernels.harness import Lane, Limits, run
from grok_bench.report import table
from grok_bench.schema import KernelResult, ResultFile, Score
from grok_engine import ModelConfig
from grok_engine.config import ActFormat
from grok_engine.loading.convert import convert

from . import engines, llama
from .llama import Load

KINDS = ("Q8_0", "BF16", "Q4_K_S")
GET = "pip install llama-cpp-python '.[bench]'"
CALL = 600.0  # seconds of a turn at most
ACTIVATIONS: tuple[ActFormat, ...] = ("none", "int8")


def small_configuration() -> ModelConfig:
    return replace(configuration(2), vocab_size=512, d_model=256, num_heads=2, num_kv_heads=1, d_ff=512)


def write_models(folder: Path, config: ModelConfig, kinds: Sequence[str]) -> dict[str, Path]:
    """Write what is missing: `xai`, the same converted to `packed`, and a GGUF file of each kind. The files by kind."""
    marker = folder / "written.json"
    same = json.dumps(config.to_dict())
    if marker.is_file() and marker.read_text() != same:
        raise ValueError(f"--dir {folder} holds another model: give an empty folder")
    if not marker.is_file():
        write(folder / "xai", config)
        marker.write_text(same)
    if not (folder / "packed").is_dir():
        convert(folder / "xai", folder / "packed")
    files = {kind: folder / f"{kind}.gguf" for kind in kinds}
    source = folder / "BF16.gguf"
    if kinds and not source.is_file():
        convert(folder / "xai", source, format="gguf", weights="bf16")
    for kind, file in files.items():
        if not file.is_file():
            llama.quantize(source, file.with_suffix(".part"), kind)
            file.with_suffix(".part").rename(file)
    return files


def lanes(load: Load, packed: Path, files: dict[str, Path]) -> list[Lane]:
    """Who takes part under a load."""
    found = []
    for activations in ACTIVATIONS:
        name = "grok-engine, int8" + (f", {activations} rows" if activations != "none" else "")
        found.append(Lane(Score(contestant=name, ours=True), partial(engines.Ours, packed, activations, load)))
    for kind, file in files.items():
        found.append(Lane(Score(contestant=f"llama.cpp, {kind}"), partial(Remote, llama.Llama, (file, load), CALL)))
    if not files:
        why = f"llama.cpp is not installed: {GET}"
        found.append(replace(found[0], score=Score(contestant="llama.cpp", status="missing", message=why)))
    return found


def problems(config: ModelConfig, new: int, small: bool) -> Iterator[tuple[KernelResult, Load]]:
    """What is timed: prefill, and decode of one and of many requests."""
    head = config.vocab_size * config.d_model
    active, every = config.active_param_count() + head, config.param_count() + head  # a byte for each int8 weight
    prompt, many = (16, 2) if small else (512, 16)
    for name, load, size in (
        (f"prefill/t{prompt}", Load(1, prompt, 0), every),
        ("decode/b1", Load(1, 16, new), active),
        (f"decode/b{many}", Load(many, 32, new), every),  # whose tokens hit nearly every expert
    ):
        work = KernelResult(
            problem=f"model/{config.name}/{name}", op="model", operations=2.0 * active * load.tokens, bytes=size,
            parameters={"parameters": config.param_count(), "tokens": load.tokens}, arithmetic="bf16",
        )  # fmt: skip
        yield work, load


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_model", description="A whole model on this CPU.")
    parser.add_argument("--dir", type=Path, help="write the models there and keep them; a temporary folder without")
    parser.add_argument("--kinds", nargs="*", default=KINDS, help="of GGUF files, by llama.cpp's names")
    parser.add_argument("--rounds", type=int, default=20, help="at most, of each problem")
    parser.add_argument("--seconds", type=float, default=90.0, help="of rounds, of each problem")
    parser.add_argument("--new", type=int, default=16, help="tokens decoded by each request")
    parser.add_argument("--threads", type=int, help="of both engines; torch's default without")
    parser.add_argument("--json", type=Path, help="write a summary there")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round: whether it runs, not how fast")
    a = parser.parse_args(arguments)
    if a.threads:
        torch.set_num_threads(a.threads)
    config = small_configuration() if a.smoke else configuration()
    kinds = a.kinds if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf") else ()
    limits = Limits(60.0, 1, CALL, pick=False) if a.smoke else Limits(a.seconds, a.rounds, CALL)
    machine, console, results = Device(small=a.smoke), table.terminal(), list[KernelResult]()
    command = shlex.join(["python", "-m", "benchmarks.cpu_model", *(sys.argv[1:] if arguments is None else arguments)])
    file = ResultFile(
        kind="kernels", command=command, environment=environment(), results=results, ceilings=machine.kept()
    )
    table.about(file, console)
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = write_models(folder, config, kinds)
        for work, load in problems(config, 2 if a.smoke else a.new, a.smoke):
            result = run(work, lanes(load, folder / "packed", files), machine, limits)
            results.append(result)
            table.one(result, console)
            for s in result.scores:
                if s.seconds:
                    console.print(f"{s.contestant}: {load.tokens / s.seconds:,.1f} tokens/s", style="dim")
            if a.json:
                file.save(a.json)
    table.unavailable(file, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
