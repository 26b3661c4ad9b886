"""`grok-engine bench latency | throughput | serve`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from grok_engine.config import ActFormat, DType, KVDType, WeightFormat

from .drive import Run, drive, joined
from .http_client import Endpoint
from .http_serve import serve_url
from .measurement import Measurement
from .metrics import parse_slo
from .workload import arrivals, random_jobs, warmup_jobs

Command = TypeVar("Command", bound=Callable[..., Any])
COUNT, AMOUNT = click.IntRange(min=1), click.IntRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)
RATIO = click.FloatRange(min=0, max=1, max_open=True)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


MODEL = _options(
    click.option("--model", default="tiny", show_default=True, help="`tiny`, a folder, or with --dummy a preset."),
    click.option("--dummy", is_flag=True, help="Random weights, of the model's architecture."),
    click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help="With --dummy: as in d_model=512."),
    click.option("--dtype", type=click.Choice(get_args(DType)), default="bfloat16", show_default=True),
    click.option("--weights", type=click.Choice(get_args(WeightFormat)), help="Default: as stored; random ones int8."),
    click.option(
        "--head", type=click.Choice(get_args(WeightFormat)), help="Of the output head; default: by --weights."
    ),
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
    click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result there."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)
LENGTHS = _options(
    click.option("--input-len", type=COUNT, default=32, show_default=True, help="Tokens of a prompt, without prefix."),
    click.option("--output-len", type=COUNT, default=128, show_default=True, help="Tokens to generate for each."),
    click.option("--prefix-len", type=AMOUNT, default=0, show_default=True, help="Tokens that all prompts begin with."),
)
TRAFFIC = _options(
    click.option("--num-prompts", type=COUNT, default=100, show_default=True, help="Requests."),
    LENGTHS,
    click.option("--random-range-ratio", type=RATIO, default=0.0, help="Lengths from (1 - r) to (1 + r) times these."),
    click.option("--num-warmups", type=AMOUNT, default=1, show_default=True, help="Requests before the measurement."),
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
    largest = measurement.config.max_num_seqs
    if batch_size > largest:
        raise ValueError(
            f"--batch-size {batch_size} is more than --max-num-seqs {largest}, the requests that run at once"
        )
    count, warmup = batch_size * (num_iters_warmup + num_iters), batch_size * num_iters_warmup
    jobs = random_jobs(count, vocab_size=measurement.config.model.vocab_size, seed=measurement.seed, **lengths)
    engine = measurement.start(jobs[warmup:], jobs[:warmup], at_once=batch_size)
    runs: list[Run] = []
    for first in range(warmup, count, batch_size):
        runs.append(drive(engine, jobs[first : first + batch_size]))
        if runs[-1].interrupted:
            break
    parameters = {**lengths, "batch_size": batch_size, "num_iters": num_iters, "num_iters_warmup": num_iters_warmup}
    whole = [run.seconds for run in runs if not run.interrupted]
    measurement.finish("latency", parameters, joined(runs), batch_seconds=whole)


@click.command()
@TRAFFIC
@MODEL
def throughput(**options: Any) -> None:
    """The rate at which many requests, there from the start, are completed."""
    _serve("throughput", options, {})


OF_TRAFFIC = ("num_prompts", "input_len", "output_len", "prefix_len", "random_range_ratio", "num_warmups")
OVER_HTTP = _options(
    click.option("--url", help="Send the requests to this OpenAI server; the model is then the one that it names."),
    click.option("--endpoint", type=click.Choice(get_args(Endpoint)), help="With --url.  [default: completions]"),
    click.option("--vocab-size", type=COUNT, help="With --url: prompts are token ids below this, not words."),
    click.option("--prompts", type=click.Path(dir_okay=False, path_type=Path), help="With --url: a file of requests."),
    click.option("--extra-body", metavar="JSON", help='With --url: for every request, as in {"ignore_eos": false}.'),
    click.option("--timeout", type=POSITIVE, help="With --url: seconds without a byte that fail it.  [default: 600]"),
)


@click.command()
@TRAFFIC
@click.option("--request-rate", type=POSITIVE, help="Requests a second on average.  [default: inf, all at once]")
@click.option("--burstiness", type=POSITIVE, help="Shape of the gamma distribution of gaps.  [default: 1, Poisson]")
@click.option("--max-concurrency", type=COUNT, help="Requests under way at once; others are sent later.")
@click.option("--goodput", multiple=True, metavar="NAME:MS ...", help="Count requests within these: ttft, tpot, e2el.")
@click.argument("more_goodput", nargs=-1, metavar="")
@OVER_HTTP
@MODEL
@click.pass_context
def serve(
    context: click.Context,
    /,
    request_rate: float | None,
    burstiness: float | None,
    max_concurrency: int | None,
    goodput: tuple[str, ...],
    more_goodput: tuple[str, ...],
    **options: Any,
) -> None:
    """Latencies while requests come over time.

    Without --url the engine runs in this process, and there is no HTTP between it and the requests.
    """
    if more_goodput and not goodput:
        raise ValueError(f"unexpected argument {more_goodput[0]!r}")
    slo = parse_slo([*goodput, *more_goodput]) or None
    rate, shape = request_rate or math.inf, burstiness or 1.0
    if math.isinf(rate) and burstiness is not None:
        raise ValueError(f"--burstiness {burstiness:g} without --request-rate: all requests come at once")
    shown = {
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": shape,
        "max_concurrency": max_concurrency,
    }
    given = {name for name in options if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    over_http = {
        name: options.pop(name) for name in ("url", "endpoint", "vocab_size", "prompts", "extra_body", "timeout")
    }
    if over_http["url"] is None:
        if unused := given & set(over_http):
            raise ValueError(f"--{min(unused).replace('_', '-')} without --url: there is no server")
        _serve("serve", options, shown, rate, shape, max_concurrency, slo)
        return
    options = {name: value for name, value in options.items() if name in OF_TRAFFIC or name in given}
    if unused := set(options) - {*OF_TRAFFIC, "model", "seed", "file"}:
        raise ValueError(f"--{min(unused).replace('_', '-')} with --url: the server has an engine of its own")
    lengths, common = _lengths(options), {"model": "", "seed": 0, "file": None}
    serve_url(
        lengths, rate=rate, burstiness=shape, max_concurrency=max_concurrency, shown=shown, slo=slo,
        **{**common, **options}, **over_http,
    )  # fmt: skip


def _serve(
    protocol: str,
    options: dict[str, Any],
    shown: dict[str, Any],
    rate: float = math.inf,
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    slo: dict[str, float] | None = None,
) -> None:
    """Send the requests of the options of TRAFFIC. `shown`: what else the result says of them."""
    count, ratio, warmups = (options.pop(name) for name in ("num_prompts", "random_range_ratio", "num_warmups"))
    lengths = _lengths(options)
    measurement = Measurement(**options)
    vocab_size, seed = measurement.config.model.vocab_size, measurement.seed
    jobs = random_jobs(count, vocab_size=vocab_size, range_ratio=ratio, seed=seed, **lengths)
    engine = measurement.start(jobs, warmup_jobs(jobs, warmups, vocab_size=vocab_size, seed=seed))
    run = drive(engine, jobs, arrivals(count, rate, burstiness, seed), max_concurrency)
    traffic = {"random_range_ratio": ratio, "num_requests": count, **shown, "num_warmups": warmups}
    measurement.finish(protocol, {**lengths, **traffic}, run, slo=slo)


def _lengths(options: dict[str, Any]) -> dict[str, int]:
    """The options of LENGTHS, taken out of `options`."""
    return {name: options.pop(name) for name in ("input_len", "output_len", "prefix_len")}
