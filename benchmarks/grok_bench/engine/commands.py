"""`grok-engine bench latency | throughput | serve`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from grok_bench.schema import Scalar
from grok_engine.config import ActFormat, DType, KVDType, WeightFormat

from .drive import Run, drive, joined
from .measurement import Measurement, Protocol
from .metrics import parse_slo
from .progress import request_progress
from .workload import Job, arrivals, at, random_jobs, read_trace, trace_jobs, warmup_jobs

Command = TypeVar("Command", bound=Callable[..., Any])
INPUT_LEN, OUTPUT_LEN, NUM_PROMPTS = 32, 128, 100


class Number(click.FloatRange):
    """A number in a range; finite, unless `infinite`, and never NaN, which click's ranges let through."""

    def __init__(self, *, infinite: bool = False, **limits: Any) -> None:
        super().__init__(**limits)
        self.infinite = infinite

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value!r} is not a {'' if self.infinite else 'finite '}number.", param, ctx)
        return number


COUNT, AMOUNT = click.IntRange(min=1), click.IntRange(min=0)
POSITIVE, RATE = Number(min=0, min_open=True), Number(min=0, min_open=True, infinite=True)
RATIO = Number(min=0, max=1, max_open=True)
INPUT = click.Path(exists=True, dir_okay=False, path_type=Path)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


MODEL = _options(
    click.option("--model", default="tiny", show_default=True, help="`tiny`, a folder, or with --dummy a preset."),
    click.option("--dummy", is_flag=True, help="Random weights, of the model's architecture."),
    click.option("--layers", type=COUNT, help="With --dummy: the number of layers."),
    click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help="With --dummy: as in d_model=512."),
    click.option("--dtype", type=click.Choice(get_args(DType)), default="bfloat16", show_default=True),
    click.option("--weights", type=click.Choice(get_args(WeightFormat)), help="Default: as stored; random ones int8."),
    click.option("--activations", type=click.Choice(get_args(ActFormat)), help="Default: by weights and device."),
    click.option("--device", default="cpu", show_default=True, help="As torch names them."),
    click.option("--kv-dtype", type=click.Choice(get_args(KVDType)), help="Of keys and values; default: --dtype."),
    click.option("--max-model-len", type=COUNT, help="Tokens of a request, at most."),
    click.option("--max-num-seqs", type=COUNT, help="Requests that run at once."),
    click.option("--max-num-batched-tokens", type=COUNT, help="Tokens of one step."),
    click.option("--page-size", type=COUNT, help="Tokens of a page of keys and values."),
    click.option("--num-pages", type=COUNT, help="Pages of keys and values."),
    click.option("--kv-memory", type=COUNT, help="Bytes for keys and values, in place of --num-pages."),
    click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True, show_default=True),
    click.option("--enforce-eager", is_flag=True, help="Decode without CUDA graphs."),
    click.option("--seed", type=AMOUNT, default=0, show_default=True, help="Of prompts, lengths and arrivals."),
    click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write a summary there."),
    click.option("--samples", is_flag=True, help="With --json: write each request's times and the timeline, too."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)
LENGTHS = _options(
    click.option("--input-len", type=COUNT, help=f"Tokens of a prompt, beside the prefix.  [default: {INPUT_LEN}]"),
    click.option("--output-len", type=COUNT, help=f"Tokens to generate for each.  [default: {OUTPUT_LEN}]"),
    click.option("--prefix-len", type=AMOUNT, help="Tokens that all prompts begin with.  [default: 0]"),
)
TRAFFIC = _options(
    click.option(
        "--num-prompts", type=COUNT, help=f"Requests; of a trace the first.  [default: {NUM_PROMPTS}, or all]"
    ),
    LENGTHS,
    click.option("--random-range-ratio", type=RATIO, help="Lengths from (1 - r) to (1 + r) times the given ones."),
    click.option("--trace", type=INPUT, help='JSONL: {"arrival": s, "input_len" or "prompt_token_ids", "output_len"}.'),
    click.option("--num-warmups", type=AMOUNT, default=1, show_default=True, help="Requests before the measurement."),
    click.option("--sample-interval", type=POSITIVE, default=0.25, show_default=True, help="Seconds, of the timeline."),
)


@click.command()
@LENGTHS
@click.option("--batch-size", type=COUNT, default=8, show_default=True, help="Requests of an iteration.")
@click.option("--num-iters-warmup", type=AMOUNT, default=2, show_default=True, help="Iterations not measured.")
@click.option("--num-iters", type=COUNT, default=10, show_default=True, help="Iterations measured.")
@MODEL
def latency(batch_size: int, num_iters_warmup: int, num_iters: int, **options: Any) -> None:
    """The time of one batch of equal requests, again and again.

    E2E is the time of a whole batch; TTFT, TPOT and ITL are of its requests. Every iteration has prompts of its own.
    """
    lengths = _lengths(options)
    measurement = Measurement(**options)
    largest = measurement.setup.config.max_num_seqs
    if batch_size > largest:
        raise ValueError(
            f"--batch-size {batch_size} is more than --max-num-seqs {largest}, the requests that run at once"
        )
    count, warmup = batch_size * (num_iters_warmup + num_iters), batch_size * num_iters_warmup
    jobs = random_jobs(count, vocab_size=measurement.model.vocab_size, seed=measurement.seed, **lengths)
    engine = measurement.start(jobs[warmup:], jobs[:warmup], at_once=batch_size)
    runs: list[Run] = []
    with request_progress(num_iters, "iterations") as show:
        for at_job in range(warmup, count, batch_size):
            runs.append(drive(engine, jobs[at_job : at_job + batch_size]))
            if runs[-1].interrupted:
                break
            show(len(runs))
    parameters = {**lengths, "batch_size": batch_size, "num_iters": num_iters, "num_iters_warmup": num_iters_warmup}
    whole = [run.seconds for run in runs if not run.interrupted]
    measurement.finish("latency", parameters, joined(runs), batch_seconds=whole)


@click.command()
@TRAFFIC
@MODEL
def throughput(num_warmups: int, sample_interval: float, **options: Any) -> None:
    """The rate at which many requests, there from the start, are completed. A trace's arrivals do not count."""
    measurement, jobs, parameters = _traffic(options)
    _run(measurement, "throughput", at(jobs, [0.0] * len(jobs)), parameters, num_warmups, sample_interval)


@click.command()
@TRAFFIC
@click.option("--request-rate", type=RATE, help="Requests a second on average, or inf: all at once.  [default: inf]")
@click.option("--burstiness", type=POSITIVE, help="Shape of the gamma distribution of gaps.  [default: 1, Poisson]")
@click.option("--max-concurrency", type=COUNT, help="Requests under way at once; others are sent later.")
@click.option("--goodput", multiple=True, metavar="NAME:MS ...", help="Count requests within these: ttft, tpot, e2el.")
@click.argument("more_goodput", nargs=-1, metavar="")
@MODEL
def serve(
    num_warmups: int,
    sample_interval: float,
    request_rate: float | None,
    burstiness: float | None,
    max_concurrency: int | None,
    goodput: tuple[str, ...],
    more_goodput: tuple[str, ...],
    **options: Any,
) -> None:
    """Latencies while requests come over time, at random or by a trace.

    The engine runs in this process; there is no HTTP between it and the requests.
    """
    if more_goodput and not goodput:
        raise ValueError(f"unexpected argument {more_goodput[0]!r}")
    slo = parse_slo([*goodput, *more_goodput]) or None
    trace = options["trace"]
    measurement, jobs, parameters = _traffic(options)
    if parameters.get("trace_arrivals"):
        for name, value in (("request-rate", request_rate), ("burstiness", burstiness)):
            if value is not None:
                raise ValueError(f"--{name} {value:g} with --trace {trace}, which says when requests come")
    else:
        rate, shape = request_rate or math.inf, burstiness or 1.0
        if math.isinf(rate) and burstiness is not None:
            raise ValueError(f"--burstiness {burstiness:g} without --request-rate: all requests come at once")
        jobs = at(jobs, arrivals(len(jobs), rate, shape, measurement.seed))
        parameters |= {"request_rate": "inf" if math.isinf(rate) else rate, "burstiness": shape}
    parameters["max_concurrency"] = max_concurrency
    _run(measurement, "serve", jobs, parameters, num_warmups, sample_interval, max_concurrency, slo)


def _run(
    measurement: Measurement,
    protocol: Protocol,
    jobs: list[Job],
    parameters: dict[str, Scalar],
    num_warmups: int,
    sample_interval: float,
    max_concurrency: int | None = None,
    slo: dict[str, float] | None = None,
) -> None:
    warmup = warmup_jobs(jobs, num_warmups, vocab_size=measurement.model.vocab_size, seed=measurement.seed)
    engine = measurement.start(jobs, warmup)
    with request_progress(len(jobs)) as show:
        run = drive(engine, jobs, max_concurrency=max_concurrency, interval=sample_interval, progress=show)
    measurement.finish(protocol, {**parameters, "num_warmups": num_warmups}, run, slo=slo)


def _lengths(options: dict[str, Any]) -> dict[str, int]:
    """The options of LENGTHS, taken out of `options`, with their defaults."""
    defaults = {"input_len": INPUT_LEN, "output_len": OUTPUT_LEN, "prefix_len": 0}
    return {name: options.pop(name) or default for name, default in defaults.items()}


def _traffic(options: dict[str, Any]) -> tuple[Measurement, list[Job], dict[str, Scalar]]:
    """The requests that the options of `throughput` and `serve` describe, and their description in the result."""
    trace, count, ratio = (options.pop(name) for name in ("trace", "num_prompts", "random_range_ratio"))
    given = {"input-len": options["input_len"], "prefix-len": options["prefix_len"], "random-range-ratio": ratio}
    lengths = _lengths(options)
    measurement = Measurement(**options)
    vocab_size, seed = measurement.model.vocab_size, measurement.seed
    if trace is None:
        count, ratio = count or NUM_PROMPTS, ratio or 0.0
        jobs = random_jobs(count, vocab_size=vocab_size, range_ratio=ratio, seed=seed, **lengths)
        return measurement, jobs, {**lengths, "random_range_ratio": ratio, "num_requests": count}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} {value} with --trace {trace}, which says how long its requests are")
    lines = read_trace(trace)[:count]
    jobs = trace_jobs(lines, output_len=lengths["output_len"], vocab_size=vocab_size, seed=seed)
    timed = lines[0].arrival is not None
    return measurement, jobs, {"trace": trace.name, "trace_arrivals": timed, "num_requests": len(jobs)}
