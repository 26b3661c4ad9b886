"""What HTTP costs: CPU time a token of the server beside the engine in process, and how late its event loop runs.

    python -m benchmarks.server_overhead tiny
    python -m benchmarks.server_overhead FILE.gguf --llama-python PYTHON_WITH_LLAMA_CPP_SERVER

Contestants take turns on the same requests, each in a process of its own, and the client runs in this one: `engine`
steps an LLMEngine, `async` reads the streams of an AsyncLLM, `server` is `grok-engine serve`'s app; with --llama-python
llama-cpp-python's server, which serves one request at a time, and the same library in process. CPU time is that of
all threads, by getrusage (of llama-cpp-python by /proc), after OMP_WAIT_POLICY=PASSIVE, so that waiting costs none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grok_bench.engine.drive import drive
from grok_bench.engine.http_client import HttpJob, Target
from grok_bench.engine.http_load import drive_http
from grok_bench.engine.http_serve import WORDS, word_jobs
from grok_bench.engine.workload import Job, random_jobs
from grok_engine import AsyncLLM, LLMEngine, RequestOutputKind, SamplingParams

PROBE_SECONDS = 0.02
ARRIVING = 5  # probes of a turn while its requests arrive
LLAMA = """
import json, sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[2]), verbose=False)
for line in sys.stdin:
    jobs, streams = json.loads(line)
    tokens = sum(1 for prompt, n in jobs for _ in llm(prompt, max_tokens=n, temperature=0, stream=True))
    print(json.dumps({"tokens": tokens}), flush=True)
"""


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cpu_seconds_of(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# The processes


def run_in_process(model: str, faces: str, options: dict[str, Any]) -> None:
    """Answer lines of jobs on standard input with a line of what they cost."""
    engine = LLMEngine(model, **options)
    llm = AsyncLLM(engine) if faces == "async" else None

    async def read_all(jobs: list[list[Any]], streams: int) -> int:
        assert llm is not None
        free, tokens = asyncio.Semaphore(streams), 0

        async def one(prompt: str, count: int) -> None:
            nonlocal tokens
            delta = RequestOutputKind.DELTA
            params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, output_kind=delta)
            async with free:
                async for output in llm.generate(prompt, params):
                    tokens += len(output.outputs[0].token_ids)

        await asyncio.gather(*(one(*job) for job in jobs))
        return tokens

    for line in sys.stdin:
        jobs, streams = json.loads(line)
        began, cpu = time.perf_counter(), cpu_seconds()
        if llm is None:
            ids = [Job(prompt=engine.encode(p, add_special_tokens=True), output_len=n) for p, n in jobs]
            tokens = sum(r.output_tokens for r in drive(engine, ids, None, streams).records)
        else:
            tokens = asyncio.run(read_all(jobs, streams))
        told = {"tokens": tokens, "cpu": cpu_seconds() - cpu, "seconds": time.perf_counter() - began}
        print(json.dumps(told), flush=True)


def run_server(model: str, options: dict[str, Any]) -> None:
    """The app behind `grok-engine serve`, and a route that tells CPU time and how late the event loop was."""
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from grok_engine.server import create_app, run

    lags: list[float] = []
    probes: list[asyncio.Task[None]] = []

    async def probe() -> None:
        while True:
            due = time.perf_counter() + PROBE_SECONDS
            await asyncio.sleep(PROBE_SECONDS)
            lags.append(time.perf_counter() - due)

    async def usage(_: Request) -> JSONResponse:
        if not probes:
            probes.append(asyncio.ensure_future(probe()))
        told = {"cpu": cpu_seconds(), "loop": time.thread_time(), "lags": lags.copy()}
        lags.clear()
        return JSONResponse(told)

    llm = AsyncLLM(LLMEngine(model, **options))
    app = create_app(llm, served_model_name="model")
    app.routes.append(Route("/usage", usage))
    run.serve(llm, app, run.listen("127.0.0.1", 0), drain_seconds=5)


# The turns


@dataclass
class Contestant:
    name: str
    process: subprocess.Popen[str]
    turn: Callable[[list[HttpJob], int], dict[str, Any]]
    turns: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


def start(*command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def in_process(name: str, process: subprocess.Popen[str]) -> Contestant:
    def turn(jobs: list[HttpJob], streams: int) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        cpu, began = cpu_seconds_of(process.pid), time.perf_counter()
        print(json.dumps([[[job.prompt, job.output_len] for job in jobs], streams]), file=process.stdin, flush=True)
        told = json.loads(process.stdout.readline())
        measured = {"cpu": cpu_seconds_of(process.pid) - cpu, "seconds": time.perf_counter() - began}
        return {**measured, **told}

    return Contestant(name, process, turn)


def served(name: str, process: subprocess.Popen[str], url: str, told: Callable[[], dict[str, Any]]) -> Contestant:
    def turn(jobs: list[HttpJob], streams: int) -> dict[str, Any]:
        before = told()
        target = Target(base=f"{url}/v1", model="model", body={"temperature": 0, "ignore_eos": True})
        _, run, _ = drive_http(target, jobs, [0.0] * len(jobs), streams)
        errors = [record.error for record in run.records if record.error]
        if errors:
            raise SystemExit(f"{name} failed {len(errors)} requests, the first with {errors[0]}")
        after = told()
        found: dict[str, Any] = {key: after[key] - before[key] for key in ("cpu", "loop") if key in after}
        tokens = sum(record.output_tokens for record in run.records)
        return {**found, "tokens": tokens, "seconds": run.seconds, "lags": after.get("lags", [])}

    return Contestant(name, process, turn)


def contestants(model: str, options: str, llama_python: str | None) -> list[Contestant]:
    def ours(role: str) -> subprocess.Popen[str]:
        return start(sys.executable, "-m", "benchmarks.server_overhead", model, "--role", role, "--options", options)

    def usage() -> dict[str, Any]:
        with urllib.request.urlopen(f"{url}/usage", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    server = ours("server")
    assert server.stdout is not None
    url = server.stdout.readline().split()[-1]
    found = [in_process(role, ours(role)) for role in ("engine", "async")]
    found.append(served("server", server, url, usage))
    if llama_python is not None:
        threads, port = str(len(os.sched_getaffinity(0))), "8765"
        alone = start(llama_python, "-c", LLAMA, model, threads)
        found.append(in_process("llama-cpp-python", alone))
        peer = start(
            llama_python, "-m", "llama_cpp.server", "--model", model, "--port", port, "--n_ctx", "2048",
            "--interrupt_requests", "false", "--n_threads", threads, "--verbose", "false",
        )  # fmt: skip
        there = f"http://127.0.0.1:{port}"
        found.append(served("its server", peer, there, lambda: {"cpu": cpu_seconds_of(peer.pid)}))
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{there}/v1/models", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--options", default="{}", help="of the engine, as JSON")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python[server]")
    parser.add_argument("--role", choices=("engine", "async", "server"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = {"max_num_seqs": 64, **json.loads(given.options)}
    if given.role == "server":
        return run_server(given.model, options)
    if given.role is not None:
        return run_in_process(given.model, given.role, options)
    found = contestants(given.model, given.options, given.llama_python)
    try:
        for at in range(given.rounds + 1):
            for streams in given.streams:
                count = max(streams, 2)
                lengths = {"input_len": 16, "output_len": given.output_len, "vocab_size": len(WORDS)}
                jobs = word_jobs(random_jobs(count, seed=at, **lengths))
                for one in found:
                    turn = one.turn(jobs, streams)
                    print(f"round {at}, {streams} streams, {one.name}: {turn['seconds']:.1f} s", file=sys.stderr)
                    if at:  # the first round warms up
                        one.turns.setdefault(streams, []).append(turn)
    finally:
        for one in found:
            one.process.terminate()
    show(found, given.streams)
    return None


def show(found: list[Contestant], streams: list[int]) -> None:
    print("| | " + " | ".join(f"{n} stream{'s' * (n > 1)}" for n in streams) + " |")
    print("|---|" + "---|" * len(streams))

    def row(name: str, value: Callable[[Contestant, int], str], one: Contestant) -> None:
        print(f"| {name} | " + " | ".join(value(one, n) for n in streams) + " |")

    def median(one: Contestant, n: int, top: str, bottom: str, scale: float = 1.0) -> str:
        return f"{scale * statistics.median(t[top] / t[bottom] for t in one.turns[n]):,.0f}"

    def lags(one: Contestant, n: int) -> str:
        found = [lag * 1e3 for turn in one.turns[n] for lag in turn["lags"][ARRIVING:]]
        return " / ".join(f"{p:.1f}" for p in np.percentile(found, (50, 99)))

    def longest(one: Contestant, n: int) -> str:
        return f"{max(lag * 1e3 for turn in one.turns[n] for lag in turn['lags'][:ARRIVING]):.0f}"

    for one in found:
        row(f"{one.name}, CPU µs a token", lambda o, n: median(o, n, "cpu", "tokens", 1e6), one)
        if "loop" in one.turns[streams[0]][0]:
            row("of them on the event loop's thread", lambda o, n: median(o, n, "loop", "tokens", 1e6), one)
            row("lag of the event loop while they run, p50 / p99, ms", lags, one)
            row("longest, as all requests come at once, ms", longest, one)
        row(f"{one.name}, tokens/s", lambda o, n: median(o, n, "tokens", "seconds"), one)


if __name__ == "__main__":
    main()
