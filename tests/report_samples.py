"""Result files made up for tests: plausible, of every status, and no measurement of anything."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from grok_bench.engine.metrics import percentiles
from grok_bench.schema import Ceiling, EngineResult, Environment, KernelResult, ResultFile, Score
from grok_bench.spread import interval

READ = 45e9
PEAKS = {"bf16": 1.0e12, "int8": 1.9e12, "fp32": 4.7e11}
PEERS = {"oneDNN bf16, prepacked": 0.72, "torch F.linear bf16, a loop over experts": 0.5, "torch.compile": 0.66}
VLLM_MISSING = "vllm is not installed: pip install vllm (needs Python < 3.13)"


def environment(**changes: Any) -> Environment:
    made = Environment(
        chip="AMD EPYC 9xx5", device="cpu", cores=2, threads=2, isa="avx512_bf16", clock_mhz=None, driver=None,
        python="3.11.7", torch="2.13.0", triton=None, compiler="g++ 12.2", os="Linux 6.18", commit="abc1234",
        dirty=False,
    )  # fmt: skip
    return replace(made, **changes)


def score(name: str, samples: list[float], **values: Any) -> Score:
    low, high = interval(samples)
    return Score(contestant=name, error=1.2e-3, seconds=median(samples), low=low, high=high, **values)


def problem(name: str, parameters: dict[str, Any], operations: float, size: float, rng: random.Random) -> KernelResult:
    op, arithmetic = name.split("/")[0], "int8" if "int8" in name else "bf16"
    floor = max(size / READ, operations / PEAKS[arithmetic])
    shares = {"grok_kernels cpu": rng.uniform(0.6, 0.95)} | {p: e * rng.uniform(0.7, 1.15) for p, e in PEERS.items()}
    times = {who: [floor / e * rng.gauss(1, 0.015) for _ in range(21)] for who, e in shares.items()}
    best = min(PEERS, key=lambda who: median(times[who]))
    scores = []
    for who, taken in times.items():
        ratio = median(b / own for b, own in zip(times[best], taken, strict=True))
        ours = who.startswith("grok")
        scores.append(score(who, taken, ours=ours, roofline=floor / median(taken), speedup=ratio))
    return KernelResult(
        problem=name, op=op, parameters=parameters, operations=operations, bytes=size, arithmetic=arithmetic,
        tolerance=0.01, floor_seconds=floor, rounds=21, thrown_away=2, best_peer=best, scores=scores,
    )  # fmt: skip


def _problems(rng: random.Random) -> Iterator[KernelResult]:
    d, f = 6144, 4096
    for weight in ("fp8", "int8"):
        for t in (1, 16, 64, 512):
            name, what = f"moe/grok-1/decode/{weight}-even-t{t}", {"format": weight, "tokens": t}
            yield problem(name, what, 2 * t * 2 * 3 * d * f, min(8, 2 * t) * 3 * d * f + 2 * t * d, rng)
    for t in (1, 4, 16, 64):
        yield problem(f"grouped_gemm/grok-1/decode/o-bf16-t{t}", {"tokens": t}, 2 * t * d * f, 2 * d * f, rng)
    yield problem("rms_norm/grok-1/prefill/t1024", {"tokens": 1024}, 4e7, 2.5e7, rng)


def kernels(seed: int = 0) -> ResultFile:
    """A dozen problems, with every status somewhere."""
    results = list(_problems(random.Random(seed)))
    nothing: dict[str, Any] = dict.fromkeys(("seconds", "low", "high", "roofline", "speedup"))
    first = results[0].scores
    first[2] = replace(
        first[2],
        status="wrong",
        error=0.31,
        message="error 3.1e-01 where 1.0e-02 is allowed, softcap <dropped> [again]",
        **nothing,
    )
    for r in results[:2]:
        r.scores.append(Score(contestant="vLLM fused_experts_cpu", status="missing", message=VLLM_MISSING))
    results[3].scores.append(Score(contestant="torch _scaled_mm", status="timeout", message="more than 30 s a call"))
    last = results[-2].scores
    last[0] = replace(last[0], status="failed", message="RuntimeError: no kernel | for this", error=None, **nothing)
    ceilings = {name: Ceiling(unit="FLOP/s", rate=rate) for name, rate in PEAKS.items()}
    return ResultFile(
        kind="kernels", command="grok-engine bench kernels", created="2026-11-23T15:00:00Z", environment=environment(),
        ceilings={"read": Ceiling(unit="B/s", rate=READ), **ceilings}, results=results,
    )  # fmt: skip


def run(rate: float, rng: random.Random, weights: str = "int8", slower: float = 1.0) -> EngineResult:
    n, out = 50, 128
    waits = [0.25 * slower * rng.lognormvariate(0, 0.1) for _ in range(n)]
    tpots = [0.012 * rng.lognormvariate(0, 0.05) for _ in range(n)]
    whole = [0.25 + 127 * t for t in tpots]
    return EngineResult(
        protocol="serve", model="grok-1",
        parameters={"layers": 2, "dummy": True, "input_len": 128, "request_rate": rate, "weights": weights},
        duration_seconds=n / rate, completed=n, failed=0, input_tokens=n * 128, output_tokens=n * out,
        requests_per_second=rate, output_tokens_per_second=rate * out, total_tokens_per_second=2 * rate * out,
        metrics={n: percentiles(v) for n, v in {"ttft": waits, "itl": tpots, "tpot": tpots, "e2e": whole}.items()},
        load_seconds=12.5, peak_memory_bytes=11_200_000_000,
    )  # fmt: skip


def engine(seed: int = 0, slower: float = 1.0) -> ResultFile:
    rng = random.Random(seed)
    runs = [run(rate, rng, slower=slower) for rate in (0.1, 0.2, 0.4)]
    runs += [run(rate, rng, "bf16", slower) for rate in (0.1, 0.2)]
    return ResultFile(
        kind="engine", command="grok-engine bench serve", created="2026-11-23T16:00:00Z", environment=environment(),
        results=runs,
    )  # fmt: skip
