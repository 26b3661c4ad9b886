"""One measurement, from the options that all protocols share to the result, its table and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from grok_bench.environment import command, environment, peak_bytes
from grok_bench.report import table
from grok_bench.schema import EngineResult, ResultFile, Scalar
from grok_engine import LLMEngine

from .drive import Run, drive
from .metrics import good, latencies, percentiles
from .setup import find_model, load
from .workload import Job

INTERRUPTED = 130  # exit status
SHOWN = ("activations", "dtype", "kv_dtype", "device", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
         "page_size", "enforce_eager")  # fmt: skip


class Measurement:
    """The constructor refuses bad options; `start` refuses what needs the jobs, before it loads anything."""

    def __init__(self, *, model: str, seed: int, file: Path | None, **options: Any) -> None:
        check_file(file)
        self.seed, self.file = seed, file
        self.config, self.folder, self.options = find_model(model, **options)
        self.load_seconds = 0.0

    def start(self, jobs: Sequence[Job], warmup: Sequence[Job], at_once: int = 1) -> LLMEngine:
        """An engine for `jobs` that has done `warmup` already, `at_once` of them at a time."""
        engine, self.load_seconds = load(self.config, self.folder, self.options, [*jobs, *warmup])
        self.config = engine.config  # resolved
        for i in range(0, len(warmup), at_once):
            if drive(engine, warmup[i : i + at_once]).interrupted:
                raise KeyboardInterrupt
        return engine

    def finish(self, protocol: str, parameters: Mapping[str, Scalar], run: Run, **more: Any) -> None:
        """Print the result and write it; after Ctrl-C as well, of what was measured until then. `more`: `summarise`."""
        c, dummy = self.config, self.folder is None
        about: dict[str, Scalar] = {
            "layers": c.model.num_layers,
            "d_model": c.model.d_model,
            "dummy": dummy,
            "weights": c.weights or ("int8" if dummy else None),
            **{name: getattr(c, name) for name in SHOWN},
            "prefix_caching": c.enable_prefix_caching,
            "seed": self.seed,
            **parameters,
        }
        result = summarise(
            run, **more, protocol=protocol, model=c.model.name, parameters=about, load_seconds=self.load_seconds,
            peak_memory_bytes=peak_bytes(c.device),
        )  # fmt: skip
        publish(result, run, self.file, c.device)


def check_file(file: Path | None) -> None:
    """ValueError if `file` cannot be written, before anything is measured."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"--json {file}: there is no folder {file.absolute().parent}")


def publish(result: EngineResult, run: Run, path: Path | None, device: str, warnings: Sequence[str] = ()) -> None:
    """Print a result with its environment, and write it to `path`. Raises Exit if the run was interrupted."""
    file = ResultFile(
        kind="engine", command=command(), environment=environment(device), results=[result],
        interrupted=run.interrupted, warnings=list(warnings),
    )  # fmt: skip
    table.about(file, table.terminal())
    table.one(result, table.terminal())
    if path is not None:
        file.save(path)
    if run.interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def summarise(
    run: Run, *, batch_seconds: Sequence[float] | None = None, slo: dict[str, float] | None = None, **about: Any
) -> EngineResult:
    """The result of a run. E2E is of `batch_seconds` where they are given, else of the requests."""
    records = run.records
    metrics = latencies(records)
    if batch_seconds is not None:
        metrics["e2e"] = percentiles(batch_seconds)
    completed = sum(r.finished for r in records)
    inputs = sum(r.input_tokens for r in records if r.times)
    outputs = sum(r.output_tokens for r in records)
    seconds = max(run.seconds, 1e-9)
    return EngineResult(
        duration_seconds=run.seconds,
        completed=completed,
        failed=sum(r.error is not None for r in records),
        input_tokens=inputs,
        output_tokens=outputs,
        requests_per_second=completed / seconds,
        output_tokens_per_second=outputs / seconds,
        total_tokens_per_second=(inputs + outputs) / seconds,
        goodput_per_second=good(records, slo) / seconds if slo else None,
        slo=slo,
        metrics=metrics,
        **about,
    )
