"""python -m benchmarks.cpu_model [--llama DIR] [--dir DIR] [--rounds N] [--threads N] [--json FILE] [--short] [--smoke]

One random model of Grok's architecture, 1.3 B parameters, as a checkpoint in the release's format and as GGUF with the
same values, so that both engines do the same work; in turns, with probes of the machine between them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench_step_share import configuration, random_tensors
from grok_bench.environment import environment
from grok_bench.kernels.device import Device
from grok_bench.kernels.harness import BUSY, NOISE, interval
from grok_bench.report.units import amount
from grok_engine import ModelConfig
from grok_engine.checkpoint.xai.reader import write_xai
from grok_engine.loading.convert import convert

from .engines import Llama, Load, Ours, Tools, find_llama
from .gguf_grok import write_gguf

KINDS = ("Q8_0", "BF16", "Q4_K_S")
GET = (
    "llama.cpp's llama-batched-bench and llama-quantize on PATH or in --llama DIR, or pip install llama-cpp-python; "
    "and pip install 'grok-engine[bench]'"
)
CEILINGS = ("read", "bf16")  # probed before and after each turn
MEASURES = ("prompt tok/s", "decode of 1 tok/s", "decode of 16 tok/s", "s to first token", "imports aside")
SECONDS = MEASURES[3:]


def small_configuration() -> ModelConfig:
    return replace(configuration(2), vocab_size=512, d_model=256, num_heads=2, num_kv_heads=1, d_ff=512)


def write_models(folder: Path, config: ModelConfig, tools: Tools | None, kinds: Sequence[str]) -> dict[str, Path]:
    """Writes what is not there yet: `xai`, the same converted, and a GGUF file of each kind. Returns the files by kind."""
    marker = folder / "written.json"
    same = json.dumps(config.to_dict())
    if marker.is_file() and marker.read_text() != same:
        raise ValueError(f"--dir {folder} holds another model: give an empty folder")
    if not marker.is_file():
        write_xai(folder / "xai", config, random_tensors(config), overwrite=True)
        marker.write_text(same)
    if not (folder / "packed").is_dir():
        convert(folder / "xai", folder / "packed")
    files = {kind: folder / f"{kind}.gguf" for kind in kinds}
    if tools is None or not kinds:
        return {}
    source = folder / "BF16.gguf"
    if not source.is_file():
        write_gguf(source.with_suffix(".part"), config, random_tensors(config))
        source.with_suffix(".part").rename(source)
    for kind, file in files.items():
        if not file.is_file():
            tools.quantize(source, file.with_suffix(".part"), kind)
            file.with_suffix(".part").rename(file)
    return files


def measure(engine: Ours | Llama, loads: Sequence[Load]) -> dict[str, float]:
    one, many = (engine.speed(load) for load in loads)
    return dict(zip(MEASURES, (one.prompt, one.decode, many.decode, *engine.first_token()), strict=True))


def rounds(
    engines: Sequence[Ours | Llama], loads: Sequence[Load], machine: Device, count: int, console: Console, pick: bool
) -> dict[str, list[dict[str, float]]]:
    """What each engine measured, turn by turn; `quiet` is 0 where something else had the machine's cores."""
    found: dict[str, list[dict[str, float]]] = {engine.name: [] for engine in engines}
    for i in range(count):
        for j in range(len(engines)):
            engine = engines[(i + j) % len(engines)]
            before = {name: machine.ceilings[name].rate() for name in CEILINGS}
            numbers = measure(engine, loads)
            after = {name: machine.ceilings[name].rate() for name in CEILINGS}
            pairs = {name: sorted((before[name], after[name])) for name in CEILINGS}
            quiet = all(
                high <= NOISE * low and low >= BUSY * machine.ceilings[name].usual
                for name, (low, high) in pairs.items()
            )
            numbers |= {name: sum(pair) / 2 for name, pair in pairs.items()}
            line = ", ".join(f"{numbers[name]:.1f} {name}" for name in MEASURES)
            numbers["quiet"] = float(quiet or not pick)
            found[engine.name].append(numbers)
            console.print(f"{engine.name}: {line}{'' if numbers['quiet'] else ' (not quiet)'}", highlight=False)
    return found


def short_turns(
    engines: Sequence[Ours | Llama], load: Load, machine: Device, count: int, console: Console
) -> list[dict[str, float]]:
    """Decoding alone, in turns so short that a machine which is never quiet for long is alike for all of one round.
    Returns those of the first engine."""
    rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
    reads: list[float] = []
    for _ in range(count):
        before = machine.ceilings["read"].rate()
        for engine in engines:
            rates[engine.name].append(engine.speed(load).decode)
        reads.append((before + machine.ceilings["read"].rate()) / 2)
    console.print(
        f"{load.requests} request, {count} rounds, reading at {amount(median(reads), 'B/s')}", highlight=False
    )
    ours = rates[engines[0].name]
    for name, turns in rates.items():
        ratios = [a / b for a, b in zip(ours, turns, strict=True)]
        low, high = interval(ratios)
        console.print(
            f"{name}: {median(turns):.1f} decode tok/s; {engines[0].name} is {median(ratios):.2f} times as fast "
            f"(95% {low:.2f} to {high:.2f})",
            highlight=False,
        )
    return [{MEASURES[1]: rate, "read": read, "quiet": 1.0} for rate, read in zip(ours, reads, strict=True)]


def table(found: dict[str, list[dict[str, float]]], title: str) -> Table:
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    result.add_column("")
    for name in (*MEASURES, "quiet turns"):
        result.add_column(name, justify="right")
    for engine, turns in found.items():
        quiet = [turn for turn in turns if turn["quiet"]]
        cells = []
        for name in MEASURES:
            digits = 2 if name in SECONDS else 1
            middle = f"{median(turn[name] for turn in quiet):.{digits}f}" if quiet else "-"
            best = (min if name in SECONDS else max)(turn[name] for turn in turns)
            cells.append(f"{middle} ({best:.{digits}f})")
        result.add_row(engine, *cells, f"{len(quiet)} of {len(turns)}")
    return result


def print_share(console: Console, config: ModelConfig, turns: list[dict[str, float]]) -> None:
    """What our decoding reads, an int8 weight a byte and the bf16 embedding as the head, by the probe beside it."""
    head = config.vocab_size * config.d_model
    size = config.active_param_count() + head
    shares = [turn["decode of 1 tok/s"] * size / turn["read"] for turn in turns if turn["quiet"]]
    if shares:
        console.print(
            f"ours reads {size / 1e6:.0f} MB a token: decode of 1 is {median(shares):.0%} of the probe's rate of reading",
            highlight=False,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_model", description="A whole model on this CPU.")
    parser.add_argument(
        "--llama", type=Path, help="the folder of llama.cpp's tools; those on PATH, or llama-cpp-python, without"
    )
    parser.add_argument("--dir", type=Path, help="write the models there and keep them; a temporary folder without")
    parser.add_argument("--kinds", nargs="*", default=KINDS, help="of GGUF files, by llama-quantize's names")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=32, help="tokens decoded by each request")
    parser.add_argument("--threads", type=int, help="of both; torch's own choice without")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--short", action="store_true", help="one request decoding alone, in --rounds of short turns")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round: whether it runs, not how fast")
    a = parser.parse_args(arguments)
    try:
        tools = find_llama(a.llama)
    except ValueError as error:
        parser.error(str(error))
    if a.threads:
        torch.set_num_threads(a.threads)
    console = Console(width=None if Console().is_terminal else 120)
    config = small_configuration() if a.smoke else configuration(8)
    loads = (Load(1, 16, 2), Load(2, 4, 2)) if a.smoke else (Load(1, 512, a.new), Load(16, 32, a.new))
    machine, about = Device(small=a.smoke), environment()
    if "read" not in machine.ceilings:
        parser.error("the native kernels were not built, and the probes between the turns are among them")
    ceilings = ", ".join(f"{name} {amount(c.rate, c.unit)}" for name, c in machine.kept().items())
    console.print(f"{about.chip}, {about.threads} thread(s), isa {about.isa}; {ceilings}", highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = write_models(folder, config, tools, a.kinds)
        ours = Ours(folder / "packed", loads)
        engines: list[Ours | Llama] = [ours, Ours(folder / "packed", loads, "int8")]
        engines += [Llama(tools, file, kind) for kind, file in files.items() if tools]
        if a.short:
            load = Load(1, 4 if a.smoke else 16, loads[0].new)
            print_share(console, config, short_turns(engines, load, machine, a.rounds, console))
            return 0
        found = rounds(engines, loads, machine, 1 if a.smoke else a.rounds, console, not a.smoke)
    title = f"{config.param_count() / 1e9:.2f} B parameters, {config.active_param_count() / 1e6:.0f} M active"
    console.print()
    console.print(table(found, f"{title}; medians of quiet turns (best of all)"), highlight=False)
    print_share(console, config, found[ours.name])
    if not files:
        console.print(f"missing (llama.cpp): {GET}", highlight=False, markup=False)
    if a.json:
        result: dict[str, Any] = {
            "environment": asdict(about),
            "model": config.to_dict(),
            "turns": found,
        }
        a.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
