"""One measurement, from the options that all protocols share to the result, its tables and its file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click

from grok_bench.environment import environment, peak_bytes
from grok_bench.report import table
from grok_bench.schema import EngineResult, ResultFile, Scalar
from grok_engine import LLMEngine, ModelConfig

from .drive import Run, drive
from .metrics import good, latencies, percentiles
from .setup import find_model
from .workload import Job

INTERRUPTED = 130  # exit status
Protocol = Literal["latency", "throughput", "serve"]


class Measurement:
    """The constructor refuses bad options; `start` refuses what needs the jobs, before it loads anything."""

    def __init__(self, *, model: str, seed: int, file: Path | None, samples: bool, **options: Any) -> None:
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"--json {file}: there is no folder {file.absolute().parent}")
        self.seed, self.file, self.samples = seed, file, samples
        self.setup = find_model(model, **options)
        self.load_seconds = 0.0

    @property
    def model(self) -> ModelConfig:
        return self.setup.model

    def start(self, jobs: Sequence[Job], warmup: Sequence[Job], *, at_once: int = 1) -> LLMEngine:
        """An engine for `jobs` that has done `warmup` already, `at_once` of them at a time."""
        engine, self.load_seconds = self.setup.load([*jobs, *warmup])
        self.setup = replace(self.setup, config=engine.config)  # resolved
        for i in range(0, len(warmup), at_once):
            if drive(engine, warmup[i : i + at_once]).interrupted:
                raise KeyboardInterrupt
        return engine

    def finish(
        self,
        protocol: Protocol,
        parameters: Mapping[str, Scalar],
        run: Run,
        *,
        batch_seconds: Sequence[float] | None = None,
        slo: dict[str, float] | None = None,
    ) -> None:
        """Print the result and write it; after Ctrl-C as well, of what was measured until then."""
        c = self.setup.config
        result = summarize(
            protocol,
            c.model.name,
            {**self._parameters(), **parameters},
            run,
            load_seconds=self.load_seconds,
            peak_memory_bytes=peak_bytes(c.device),
            batch_seconds=batch_seconds,
            slo=slo,
        )
        file = ResultFile(
            kind="engine", command=_command(), environment=environment(c.device), results=[result],
            interrupted=run.interrupted,
        )  # fmt: skip
        table.about(file, table.terminal())
        table.one(file, result, table.terminal())
        if self.file is not None:
            file.save(self.file, self.samples)
        if run.interrupted:
            raise click.exceptions.Exit(INTERRUPTED)

    def _parameters(self) -> dict[str, Scalar]:
        c, dummy = self.setup.config, self.setup.folder is None
        return {
            "layers": c.model.num_layers,
            "d_model": c.model.d_model,
            "dummy": dummy,
            "weights": c.weights or ("int8" if dummy else None),
            "activations": c.activations,
            "dtype": c.dtype,
            "kv_dtype": c.kv_dtype,
            "device": c.device,
            "max_model_len": c.max_model_len,
            "max_num_seqs": c.max_num_seqs,
            "max_num_batched_tokens": c.max_num_batched_tokens,
            "page_size": c.page_size,
            "prefix_caching": c.enable_prefix_caching,
            "enforce_eager": c.enforce_eager,
            "seed": self.seed,
        }


def summarize(
    protocol: Protocol,
    model: str,
    parameters: dict[str, Scalar],
    run: Run,
    *,
    load_seconds: float,
    peak_memory_bytes: int,
    batch_seconds: Sequence[float] | None = None,
    slo: dict[str, float] | None = None,
) -> EngineResult:
    """The result of a run. E2E is of `batch_seconds` where they are given, else of the requests."""
    records = run.records
    metrics = latencies(records)
    if batch_seconds is not None:
        metrics["e2e"] = percentiles(batch_seconds)
    completed = sum(r.finished for r in records)
    inputs = sum(r.input_tokens for r in records if r.times)
    outputs = sum(len(r.times) for r in records)
    seconds = max(run.seconds, 1e-9)
    return EngineResult(
        protocol=protocol,
        model=model,
        parameters=parameters,
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
        load_seconds=load_seconds,
        peak_memory_bytes=peak_memory_bytes,
        timeline=run.timeline,
        requests=[record.shown() for record in records],
    )


def _command() -> str:
    context = click.get_current_context()
    given = context.find_root().obj
    return f"grok-engine {shlex.join(given)}" if given else context.command_path
