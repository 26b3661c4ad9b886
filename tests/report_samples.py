"""Result files made up for tests: plausible, of every status, and no measurement of anything."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from grok_bench.schema import (
    Ceiling,
    EngineResult,
    Environment,
    KernelResult,
    Moment,
    Percentiles,
    RequestTimes,
    ResultFile,
    Score,
)  # fmt: skip

READ = 45e9
PEAKS = {"bf16": 1.0e12, "int8": 1.9e12, "fp32": 4.7e11}
PEERS = {
    "oneDNN bf16, prepacked": 0.72,
    "torch F.linear bf16, a loop over experts": 0.5,
    "vLLM cpu_fused_moe, the fp8 of its CPU wheel (silu)": 0.8,
    "torch.compile, frozen, static routing": 0.66,
}
VLLM_MISSING = "vllm is not installed: pip install vllm --extra-index-url …/cpu (needs Python < 3.13)"


def environment(**changes: Any) -> Environment:
    made = Environment(
        chip="AMD EPYC 9xx5", device="cpu", cores=2, threads=2, isa="avx512_bf16", clock_mhz=None, driver=None,
        python="3.11.7", torch="2.13.0", triton=None, compiler="g++ 12.2", os="Linux 6.18", commit="abc1234", dirty=False,
    )  # fmt: skip
    return replace(made, **changes)


def score(name: str, samples: list[float], **values: Any) -> Score:
    ordered = sorted(samples)
    cut = len(samples) // 4
    return Score(
        contestant=name, ours=values.pop("ours", False), status="ok", error=1.2e-3, tolerance=1e-2,
        seconds=median(samples), low=ordered[cut], high=ordered[-1 - cut], samples=samples, **values,
    )  # fmt: skip


def problem(
    name: str, op: str, parameters: dict[str, Any], operations: float, size: float, arithmetic: str, efficiency: float,
    rng: random.Random, peers: dict[str, float] | None = None,
) -> KernelResult:  # fmt: skip
    floor = max(size / READ, operations / PEAKS[arithmetic])
    base = {"ours": efficiency} | {p: e * rng.uniform(0.7, 1.15) for p, e in (peers or PEERS).items()}
    found = KernelResult(
        problem=name, op=op, family="grok-1", parameters=parameters, operations=operations, bytes=size,
        arithmetic=arithmetic, floor_seconds=floor, rounds=21, thrown_away=2, best_peer=None, scores=[],
    )  # fmt: skip
    times = {who: [floor / e * rng.gauss(1, 0.015) for _ in range(21)] for who, e in base.items()}
    best = min((who for who in base if who != "ours"), key=lambda who: median(times[who]))
    for who, taken in times.items():
        t = median(taken)
        ratios = median(b / mine for b, mine in zip(times[best], taken, strict=True))
        found.scores.append(
            score(
                "grok_kernels cpu" if who == "ours" else who, taken, ours=who == "ours", bytes_per_second=size / t,
                operations_per_second=operations / t, share_of_roofline=floor / t, times_best_peer=ratios,
            )
        )  # fmt: skip
    return replace(found, best_peer=best)


def _problems(rng: random.Random) -> Iterator[KernelResult]:
    d, f = 6144, 4096
    for weight, arithmetic in (("fp8", "bf16"), ("int8", "int8")):
        for routing in ("even", "skewed"):
            for t in (1, 16, 64, 512):
                hit = min(8, 2 * t) if routing == "even" else min(4, 2 * t)
                what = {"tokens": t, "routing": routing, "weight": weight}
                yield problem(
                    f"moe-{weight}-grok1-{routing}-t{t}", "moe", what, 2 * t * 2 * 3 * d * f,
                    hit * 3 * d * f + 2 * t * d, arithmetic, rng.uniform(0.6, 0.95), rng,
                )  # fmt: skip
    for t in (1, 4, 16, 64, 512):
        yield problem(
            f"grouped_gemm-bf16-n4096-k6144-t{t}", "grouped_gemm", {"tokens": t, "n": f, "k": d}, 2 * t * d * f,
            2 * d * f, "bf16", rng.uniform(0.5, 0.95), rng,
        )  # fmt: skip
    attention = {
        "torch sdpa, the heads of a group as queries": 0.4,
        "vLLM cpu_attention_with_kv_cache, softcap 30": 0.7,
    }
    for keys in (4096, 32768):
        for name, queries in (("decode", 1), ("prefill512", 512)):
            what = {"keys": keys, "queries": queries}
            yield problem(
                f"attention-{name}-h48-g8-l{keys}", "paged_attention", what, 4 * 48 * 128 * keys * queries,
                keys * 8 * 128 * 4, "bf16", rng.uniform(0.5, 0.9), rng, attention,
            )  # fmt: skip
    yield problem(
        "rms_norm-d6144-t1024", "rms_norm", {"tokens": 1024, "d": d}, 4e7, 2.5e7, "fp32", 0.9, rng, {"torch": 0.3}
    )


def kernels(seed: int = 0) -> ResultFile:
    """Two dozen problems, with every status somewhere."""
    rng = random.Random(seed)
    results = list(_problems(rng))
    nothing: dict[str, Any] = {"seconds": None, "low": None, "high": None, "samples": []}
    nothing |= dict.fromkeys(("bytes_per_second", "operations_per_second", "share_of_roofline", "times_best_peer"))
    first = results[0].scores
    first[2] = replace(first[2], status="wrong", error=0.31, message="softcap <dropped> [again]", **nothing)
    first.append(Score(contestant="vLLM fused_experts_cpu", ours=False, status="missing", message=VLLM_MISSING))
    results[1].scores.append(
        Score(contestant="vLLM fused_experts_cpu", ours=False, status="missing", message=VLLM_MISSING)
    )
    slow = Score(contestant="torch _scaled_mm fp8", ours=False, status="timeout", message="more than 30 s a call")
    results[3].scores.append(slow)
    last = results[-2].scores
    last[0] = replace(last[0], status="failed", message="RuntimeError: no kernel | for this", error=None, **nothing)
    return ResultFile(
        kind="kernels", command="grok-engine bench kernels", created="2026-11-23T15:00:00Z", environment=environment(),
        ceilings={"read": Ceiling(unit="B/s", rate=READ)}
        | {name: Ceiling(unit="FLOP/s", rate=rate) for name, rate in PEAKS.items()},
        results=results,
    )  # fmt: skip


def quantiles(values: list[float]) -> Percentiles:
    ordered = sorted(values)
    p50, p90, p99 = (ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.9, 0.99))
    return Percentiles(mean=sum(values) / len(values), p50=p50, p90=p90, p99=p99)


def run(rate: float, rng: random.Random, weights: str = "int8", most: float = 90.0) -> EngineResult:
    n, out = 50, 128
    load = min(0.97, rate * out / most)
    slow = 1 / (1.03 - load)
    waits = [0.25 * slow * rng.lognormvariate(0, 0.3) for _ in range(n)]
    tpots = [0.012 * (1 + 2 * load) * rng.lognormvariate(0, 0.15) for _ in range(n)]
    whole = [w + 127 * t for w, t in zip(waits, tpots, strict=True)]
    made = min(rate * out, most)
    length = n * out / made
    timeline, used, waiting = [], 0.0, 0
    for i in range(120):
        used = max(0.0, min(1.0, used + rng.gauss(0.02 if i < 60 else -0.01, 0.04)))
        waiting = max(0, waiting + rng.choice((-1, 0, 0, 1)) + (i == 40) * 6 - (i > 70))
        timeline.append(
            Moment(
                t=i * length / 119, running=round(8 * used), waiting=waiting, kv_pages_used=round(400 * used),
                kv_pages=400, prefix_hit_tokens=0, tokens=round(n * out * i / 119),
            )
        )  # fmt: skip
    return EngineResult(
        protocol="serve", model="grok-1",
        parameters={
            "layers": 2, "dummy": True, "input_len": 128, "output_len": out, "request_rate": rate, "num_requests": n,
            "seed": 0, "dtype": "bfloat16", "weights": weights,
        },
        duration_seconds=length, completed=n, failed=0, input_tokens=n * 128, output_tokens=n * out,
        requests_per_second=made / out, output_tokens_per_second=made, total_tokens_per_second=2 * made,
        goodput_per_second=made / out * (1 - load / 2), slo={"ttft_ms": 500, "tpot_ms": 50},
        metrics={"ttft": quantiles(waits), "itl": quantiles(tpots), "tpot": quantiles(tpots), "e2e": quantiles(whole)},
        load_seconds=12.5, peak_memory_bytes=11_200_000_000, timeline=timeline,
        requests=[
            RequestTimes(arrival=i / rate, ttft=w, e2e=e, output_tokens=out)
            for i, (w, e) in enumerate(zip(waits, whole, strict=True))
        ],
    )  # fmt: skip


def engine(seed: int = 0) -> ResultFile:
    rng = random.Random(seed)
    runs = [run(rate, rng) for rate in (0.1, 0.2, 0.4, 0.55, 0.65, 0.7)]
    runs += [run(rate, rng, "bf16", 45.0) for rate in (0.1, 0.2, 0.3, 0.35)]
    runs = [r if i in (2, 5) else replace(r, timeline=[]) for i, r in enumerate(runs)]
    return ResultFile(
        kind="engine", command="grok-engine bench serve", created="2026-11-23T16:00:00Z", environment=environment(),
        ceilings={}, results=runs,
    )  # fmt: skip


def extreme() -> ResultFile:
    """What strains a figure: a chip a thousand times as fast, many contestants with long names, ratios from 0.01 to 200."""
    rng = random.Random(5)
    results = []
    many = {f"a peer with a name that is longer than any figure is wide, variant {i}": 0.8 - i / 20 for i in range(12)}
    for k, t in enumerate((1, 2, 3, 4, 6, 8, 12, 16, 1024, 8192)):
        made = problem(
            f"a_rather_long_op_name-with-many-parts-and-a-long-family-name-t{t}",
            "a_rather_long_op_name",
            {"tokens": t},
            4e11 * t,
            6e9,
            "bf16",
            0.9,
            rng,
            many,
        )
        scale = 10 ** (k / 2 - 2)
        scores = [replace(s, times_best_peer=scale, samples=[]) if s.ours else s for s in made.scores]
        results.append(replace(made, scores=scores))
    ours = replace(results[0].scores[0], times_best_peer=None)
    nobody = [replace(s, status="missing", seconds=None, samples=[]) for s in results[0].scores[1:]]
    alone = replace(results[0], problem="alone-t1", op="alone", best_peer=None, scores=[ours, *nobody])
    ceilings = {"read": Ceiling(unit="B/s", rate=3.3e12), "bf16": Ceiling(unit="FLOP/s", rate=8.1e14)}
    ceilings |= {"fp8": Ceiling(unit="FLOP/s", rate=8.3e14), "copy": Ceiling(unit="B/s", rate=3.0e12)}
    return replace(
        kernels(),
        results=[*results, alone],
        ceilings=ceilings,
        environment=environment(chip="NVIDIA H200 141GB HBM3e of a rather long name", device="cuda", isa=None),
    )
