"""The command grok-engine: generate text, inspect or convert a checkpoint, plan a deployment, measure."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
import torch
from rich.console import Console
from rich.table import Table

import grok_kernels
from grok_kernels.chips import GPUS

from . import AsyncLLM, LLMEngine, __version__
from .config import ActFormat, ConfigError, DType, KVDType, WeightFormat, described
from .llm import LLM
from .loading.convert import FileFormat, convert
from .loading.resolve import read_config, resolve_model
from .models.families import PRESETS
from .progress import byte_bar, window_bar
from .sampling.params import SamplingParams
from .tools.chat import Conversation, require_template
from .tools.chat import run as run_chat
from .tools.eval import CONTEXT, evaluate, read_text
from .tools.inspect import inspect_checkpoint
from .tools.inspect_view import render as render_report
from .tools.plan import PlanKV, plan, stored_checkpoint
from .tools.plan_cpu import Rates, measure, plan_cpu
from .tools.plan_view import render as render_plan
from .tools.plan_view import render_cpu


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="grok-engine", message="%(prog)s %(version)s")
def app() -> None:
    """Runs models of the Grok-1 kind: top-2 of 8 experts, 8-bit weights."""


_debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _one_of(literal: Any) -> click.Choice[str]:
    return click.Choice(get_args(literal))


_head = click.option("--head", type=_one_of(WeightFormat), help="Convert the output head; by default as --weights.")


@app.command()
@click.option(
    "--model", default="tiny", show_default=True, help="`tiny`, which ships with the package, a folder or a .gguf file."
)
@click.option("--prompt", help="The text to continue; read from standard input if not given.")
@click.option("--token-ids", help="The prompt as token ids, as in 17,4,99; prints token ids.")
@click.option("--max-tokens", type=int, help="Tokens to generate at most; by default the model's own number, else 128.")
@click.option(
    "--temperature", type=float, help="0 takes the most probable token; by default as the model's files say, else 0.8."
)
@click.option(
    "--top-p",
    type=float,
    help="Sample among the likeliest tokens of this probability; by default as the model's files say, else 0.95.",
)
@click.option("--seed", type=int, help="Repeats a text.")
@click.option(
    "--max-model-len", type=int, help="Tokens of the context; by default what the model has and memory holds."
)
@click.option("--dtype", type=_one_of(DType), default="bfloat16", show_default=True, help="Of the computation.")
@click.option("--weights", type=_one_of(WeightFormat), help="Convert while loading; by default as they are stored.")
@_head
@click.option(
    "--activations", type=_one_of(ActFormat), help="Round the rows too; by default as weights and device are."
)
@click.option("--mmap", is_flag=True, help="Map the file of a converted model, in place of reading it.")
@click.option("--device", default="cpu", show_default=True, help="As torch names them.")
@click.option("--stats", is_flag=True, help="Print rates, memory and backends afterwards.")
@_debug
def generate(model: str, prompt: str | None, token_ids: str | None, stats: bool, **options: Any) -> None:
    """Continue a text, printing it as it comes."""
    given = {name: options.pop(name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**given)  # reject a wrong number before loading
    resolve_model(model)  # reject a wrong name before waiting for standard input
    request = _prompt(prompt, token_ids)
    began = time.monotonic()
    llm = LLM(model, **options)
    load_s = time.monotonic() - began
    chunks = llm.stream(request, _sampling(llm, given))
    if isinstance(request, str) and sys.stdout.isatty():
        click.secho(request, bold=True, nl=False)
    times = [time.monotonic()]
    for chunk in chunks:
        times.append(time.monotonic())
        text = chunk.text if isinstance(request, str) else f"{',' * (len(times) > 2)}{chunk.token_id}"
        print(text, end="", flush=True)
    print()
    if stats:
        _print_stats(llm, len(llm.encode(request, add_special_tokens=True)), load_s, times)


def _sampling(llm: LLM, given: dict[str, Any]) -> SamplingParams:
    """What was asked for, else what the model's files say, else numbers that suit a text."""
    plain, defaults = SamplingParams(), llm.get_default_sampling_params()
    chosen: dict[str, Any] = {"max_tokens": 128} if defaults.max_tokens == plain.max_tokens else {}
    if replace(defaults, max_tokens=plain.max_tokens) == plain:
        chosen |= {"temperature": 0.8, "top_p": 0.95}
    return replace(defaults, **chosen | given)


def _prompt(prompt: str | None, token_ids: str | None) -> str | list[int]:
    if prompt is not None and token_ids is not None:
        raise ValueError("--prompt and --token-ids are both given: expected one of them")
    if token_ids is not None:
        try:
            return [int(part) for part in token_ids.split(",")]
        except ValueError:
            raise ValueError(f"--token-ids {token_ids!r} is not a list of integers, as in 17,4,99") from None
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt TEXT, or text on standard input")
    return sys.stdin.read().removesuffix("\n")


def _print_stats(llm: LLM, prompt_tokens: int, load_s: float, times: list[float]) -> None:
    """times: the start of generation, then when each token came."""
    first = times[1] - times[0]
    decoded, decode_s = len(times) - 2, times[-1] - times[1]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan")
    table.add_column()
    c = llm.config
    table.add_row("model", f"{c.model.name}, {c.dtype} on {c.device}, loaded in {load_s:.2f} s")
    table.add_row("prompt", f"{prompt_tokens} token{'s' * (prompt_tokens != 1)}, {prompt_tokens / first:.1f} tokens/s")
    table.add_row("time to first token", f"{first * 1e3:.1f} ms")
    rate = f"{decoded / decode_s:.1f} tokens/s" if decoded else "no token after the first"
    table.add_row("decode", f"{decoded + 1} tokens, {rate}")
    modules = (getattr(module, "weight", None) for module in llm.model.modules())
    weights = [weight for weight in modules if isinstance(weight, grok_kernels.Weight)]
    count, nbytes = sum(math.prod(w.shape) for w in weights), sum(w.nbytes for w in weights)
    formats = ", ".join(dict.fromkeys(weight.format for weight in weights))
    table.add_row("weights", f"{nbytes / 1e6:,.0f} MB, {8 * nbytes / count:.2f} bits each ({formats})")
    table.add_row("peak memory", f"{_peak_bytes(llm) / 1e6:,.0f} MB")
    served = {op: "+".join(backends) for op, backends in grok_kernels.chosen().items()}
    for backend in dict.fromkeys(served.values()):
        table.add_row(f"{backend} backend", ", ".join(op for op in served if served[op] == backend))
    Console(stderr=True, highlight=False).print(table)


def _peak_bytes(llm: LLM) -> int:
    if llm.config.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@app.command(name="chat")
@click.argument("model")
@click.option("--system", help="A system prompt.")
@click.option("--chat-template", help="Jinja, its file, or the name of one of the model's; by default the model's own.")
@click.option("--max-tokens", default=512, show_default=True, help="Tokens of an answer at most.")
@click.option("--temperature", type=float, help="0 takes the most probable token; by default as for generate.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens of this probability, as for generate.")
@click.option("--seed", type=int, help="Repeats a conversation.")
@click.option(
    "--max-model-len", type=int, help="Tokens of the context; by default what the model has and memory holds."
)
@click.option("--dtype", type=_one_of(DType), default="bfloat16", show_default=True, help="Of the computation.")
@click.option("--weights", type=_one_of(WeightFormat), help="Convert while loading; by default as they are stored.")
@_head
@click.option("--device", default="cpu", show_default=True, help="As torch names them.")
@_debug
def chat_command(model: str, system: str | None, chat_template: str | None, **options: Any) -> None:
    """Talk to a model: answers stream, Ctrl-C stops one, Ctrl-D ends. Off a terminal, each line of input is a turn."""
    given = {name: options.pop(name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**given)  # reject a wrong number before loading
    if chat_template is None:
        require_template(resolve_model(model))  # reject a base model before loading it
    llm = LLM(model, **options)
    run_chat(Conversation(llm, _sampling(llm, given), system=system, chat_template=_template(chat_template)))


def _template(given: str | None) -> str | None:
    """The text of a template that may be given as a file."""
    return given if given is None or not Path(given).is_file() else Path(given).read_text(encoding="utf-8")


def _served_name(model: str) -> str:
    """A path tells clients about the machine: its last part is enough."""
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


@app.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", multiple=True, envvar="GROK_ENGINE_API_KEY", help="Clients must send one of these.")
@click.option("--chat-template", help="Jinja, its file, or the name of one of the model's; by default the model's own.")
@click.option(
    "--served-model-name", multiple=True, help="What clients call the model; by default MODEL, of a path the last part."
)
@click.option("--max-model-len", type=int, help="Tokens of a request; by default what the model has and memory holds.")
@click.option("--max-num-seqs", default=64, show_default=True, help="Sequences that run at once.")
@click.option("--max-waiting", default=8192, show_default=True, help="Requests that wait; more get status 429.")
@click.option("--kv-memory", type=int, help="Bytes of the KV cache; by default what memory holds.")
@click.option("--dtype", type=_one_of(DType), default="bfloat16", show_default=True, help="Of the computation.")
@click.option("--weights", type=_one_of(WeightFormat), help="Convert while loading; by default as they are stored.")
@_head
@click.option("--activations", type=_one_of(ActFormat), help="Round the rows too, as for generate.")
@click.option("--kv", "kv_dtype", type=_one_of(KVDType), help="Of keys and values; by default that of --dtype.")
@click.option("--mmap", is_flag=True, help="Map the file of a converted model, in place of reading it.")
@click.option("--device", default="cpu", show_default=True, help="As torch names them.")
@click.option("--expert-load", is_flag=True, help="Count each expert's tokens, for /metrics and the page at /.")
@click.option("--request-timeout", type=float, help="Seconds after which a request ends with an error.")
@click.option("--drain-timeout", default=30.0, show_default=True, help="Seconds that requests get after SIGTERM.")
@click.option("--quiet", is_flag=True, help="Log failures, not every request.")
@_debug
def serve(
    model: str, host: str, port: int, api_key: tuple[str, ...], served_model_name: tuple[str, ...],
    chat_template: str | None, request_timeout: float | None, drain_timeout: float, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Serve a model over HTTP, by OpenAI's API. SIGTERM or Ctrl-C finishes what runs; a second one stops at once."""
    try:
        from .server import Limits, create_app
        from .server.run import listen, log_to_stderr
        from .server.run import serve as run_server
    except ImportError as error:
        raise click.ClickException(
            f"{error}; the server needs an extra: pip install '.[serve]' in a checkout"
        ) from None
    resolve_model(model)  # reject a wrong name, and an address in use, before loading
    socket = listen(host, port)
    log_to_stderr(logging.WARNING if quiet else logging.INFO)
    llm = AsyncLLM(LLMEngine(model, **options))
    limits = Limits(request_seconds=request_timeout)
    server = create_app(
        llm, served_model_name=served_model_name or _served_name(model), api_key=api_key,
        chat_template=_template(chat_template), limits=limits,
    )  # fmt: skip
    run_server(llm, server, socket, drain_seconds=drain_timeout)


@app.command(name="eval")
@click.argument("model")
@click.option("--text", "file", required=True, help="A file in UTF-8, or - for standard input.")
@click.option("--context", type=int, help="Tokens of a window; by default 1024, or what the model takes.")
@click.option("--stride", type=int, help="Tokens from one window to the next; by default half of --context.")
@click.option("--bos/--no-bos", default=None, help="Put BOS in front of the text; by default as the model's files say.")
@click.option("--limit", type=int, help="Score the first tokens of the text alone, so many.")
@click.option("--dtype", type=_one_of(DType), default="bfloat16", show_default=True, help="Of the computation.")
@click.option("--weights", type=_one_of(WeightFormat), help="Convert while loading; by default as they are stored.")
@_head
@click.option("--activations", type=_one_of(ActFormat), help="Round the rows too, as for generate.")
@click.option("--kv", "kv_dtype", type=_one_of(KVDType), help="Of keys and values; by default that of --dtype.")
@click.option("--device", default="cpu", show_default=True, help="As torch names them.")
@_json
@_debug
def eval_command(
    model: str, file: str, context: int | None, stride: int | None, bos: bool | None, limit: int | None,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Perplexity and bits per byte of a text.

    MODEL is a folder, a .gguf file, or `tiny`. Every token is scored once, in the first window that reaches it.
    """
    text = read_text(file)
    context = min(CONTEXT, read_config(resolve_model(model)).max_position) if context is None else context
    with LLM(model, max_model_len=context, max_num_seqs=1, **options) as llm, window_bar() as progress:
        result = evaluate(llm, text, context=context, stride=stride, bos=bos, limit=limit, progress=progress)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        for name, value in result.lines():
            print(f"{name:<15} {value}")


@app.command(name="convert")
@click.argument("model")
@click.argument("out")
@click.option(
    "--format",
    type=_one_of(FileFormat),
    default="packed",
    show_default=True,
    help="packed: as the CPU's kernels want it in memory, loaded as fast as it can be read. hf: a folder as the hub "
    "has it, for transformers and vLLM. gguf: a file for llama.cpp.",
)
@click.option("--weights", type=_one_of(WeightFormat), help="Round or widen the values; by default nothing is lost.")
@click.option("--dtype", type=_one_of(DType), default="bfloat16", show_default=True, help="Packed: of the computation.")
@_debug
def convert_command(model: str, out: str, **options: Any) -> None:
    """Write a checkpoint in another format.

    MODEL is a folder, a .gguf file, or `tiny`; OUT is a new folder, or a new file .gguf, which is then a model for
    --model.
    """
    with byte_bar("converting") as progress:
        made = convert(model, out, **options, progress=progress)
    size = sum(file.stat().st_size for file in (made.iterdir() if made.is_dir() else (made,)))
    print(f"{made}: {size:,} bytes")


@app.command()
@click.argument("path")
@click.option("--verify", is_flag=True, help="Read all of it: ranges, NaN, scales out of range.")
@click.option("--all", "all_tensors", is_flag=True, help="A row for every tensor, not one for like layers.")
@_json
@_debug
def inspect(path: str, verify: bool, all_tensors: bool, as_json: bool) -> None:
    """Show what a checkpoint holds; no weight is read without --verify. PATH is a folder, a .gguf file, or `tiny`."""
    folder = resolve_model(path)
    with byte_bar("reading", shown=verify) as progress:
        report = inspect_checkpoint(folder, verify=verify, progress=progress)
    _show(report, partial(render_report, every_tensor=all_tensors), as_json)
    if not report.ok:
        raise click.exceptions.Exit(1)


@app.command(name="plan")
@click.argument("model", default="grok-1")
@click.option("--gpu", type=click.Choice(list(GPUS)), help="The chip; by default h100-80gb.")
@click.option("--gpus", type=int, help="How many, as one tensor-parallel group; by default the fewest that hold it.")
@click.option(
    "--cpu",
    is_flag=False,
    flag_value="measure",
    metavar="[GB/S]",
    help="Decode on a CPU with this memory bandwidth or, without a number, at the rates that its kernels reach here.",
)
@click.option("--weights", type=_one_of(WeightFormat), default="int8", show_default=True)
@click.option("--head", type=_one_of(WeightFormat), help="Of the output head; by default bf16.")
@click.option("--kv", type=_one_of(PlanKV), default="bf16", show_default=True, help="Type of keys and values.")
@click.option("--context", type=int, help="Tokens of a request; by default all that the model takes.")
@click.option("--batch", default=1, show_default=True, help="Requests at once.")
@_json
@_debug
def plan_command(model: str, gpu: str | None, gpus: int | None, cpu: str | None, as_json: bool, **options: Any) -> None:
    """Say before a download whether a model fits, and how fast GPUs could run it at best, or a CPU decode it.

    MODEL is grok-1 (the default), another published architecture by name, tiny, a folder, a .gguf file, or org/name in
    the hub's cache.
    """
    folder = None if model in PRESETS else _folder(model)
    config = PRESETS[model] if folder is None else read_config(folder)
    if cpu is None:
        checkpoint = None if folder is None else stored_checkpoint(folder, config)
        result = plan(config, chip=gpu or "h100-80gb", gpus=gpus, checkpoint=checkpoint, **options)
        _show(result, render_plan, as_json)
        return
    if gpu is not None or gpus is not None:
        raise ConfigError("--cpu beside --gpu or --gpus: expected one kind of machine")
    options["head"] = options["head"] or "bf16"
    rates = measure(options["weights"], options["head"]) if cpu == "measure" else Rates.of(_number(cpu))
    _show(plan_cpu(config, rates, **options), render_cpu, as_json)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--cpu {text}: expected the memory bandwidth in GB/s, or no value") from None


class Bench(click.Group):
    """The commands of `grok_bench`, imported only when one of them is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from grok_bench.cli import bench

        return bench.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from grok_bench.cli import bench

        return bench.get_command(ctx, cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--list` is an alias of the command `list`."""
        return super().parse_args(ctx, ["list", *args[1:]] if args[:1] == ["--list"] else args)


@app.group(cls=Bench)
def bench() -> None:
    """Measure the engine's latency, throughput and serving, and the kernels (--list [PATTERN...] lists them)."""


def _show(result: Any, render: Callable[[Any, Console], None], as_json: bool) -> None:
    """Print a report or a plan, drawn or as JSON."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        render(result, Console(highlight=False))


def _folder(model: str) -> Path:
    try:
        return resolve_model(model)
    except ConfigError as error:
        raise ConfigError(f"{error}; the published architectures are {', '.join(PRESETS)}") from None


class _Shown(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints the engine's warnings to whatever `sys.stderr` is when each comes: while a progress bar is drawn, rich
    replaces it, and prints them above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Bad input is one line on standard error and status 2; --debug shows the traceback."""
    shown = _Shown()
    shown.setFormatter(logging.Formatter("grok-engine: %(message)s"))
    if argv is None:
        # The process is ours, and what it imported lives as long as it does. Unfrozen, GC passes at exit would scan all
        # of torch's objects several times, which takes 0.4 s.
        gc.freeze()
        logging.getLogger("grok_engine").addHandler(shown)
        argv = sys.argv[1:]
    try:
        status = app.main(argv, prog_name="grok-engine", standalone_mode=False, obj=argv)
        return status if isinstance(status, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except (click.ClickException, ValueError, NotImplementedError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if "--debug" in argv and not isinstance(error, click.ClickException):
            raise
        return _fail(error.format_message() if isinstance(error, click.ClickException) else str(error))
    except (KeyboardInterrupt, click.Abort):
        print(file=sys.stderr)
        return 130
    except Exception as error:  # a fault of ours, or more than the machine has: whatever it was, one line
        if "--debug" in argv:
            raise
        return _fail(f"{described(error)} (--debug shows where)")
    finally:
        logging.getLogger("grok_engine").removeHandler(shown)


def _fail(message: str) -> int:
    """The one line on standard error; gives the exit status."""
    print(f"grok-engine: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
