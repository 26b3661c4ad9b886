"""The engine benchmarks: their arithmetic, their files and their commands. No time is compared with any other."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grok_bench import environment, schema
from grok_bench.engine.drive import Run, drive, joined
from grok_bench.engine.measurement import summarise
from grok_bench.engine.metrics import Record, good, latencies, parse_slo, percentiles
from grok_bench.engine.setup import find_model
from grok_bench.engine.workload import arrivals, random_jobs, warmup_jobs
from grok_engine import LLMEngine, ModelConfig, RequestOutput
from grok_engine.cli import main
from grok_engine.loading.random import weight_bytes
from grok_engine.models.families import PRESETS
from grok_engine.runtime import memory

Captured = pytest.CaptureFixture[str]
SMALL = {"d_model": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position": 256}
SIZES = [*(f"{name}={value}" for name, value in SMALL.items()), "d_ff=64"]
DUMMY = ["--model", "grok-1", "--dummy", "--set", "num_layers=2", *(part for size in SIZES for part in ("--set", size))]


def small(preset: str = "grok-1", **changes: Any) -> ModelConfig:
    config = PRESETS[preset]
    widths = {name: 64 for name in ("d_ff", "dense_d_ff") if getattr(config, name)}
    return replace(config, **{"num_layers": 2, "attn_scale": 0.0, **SMALL, **widths, **changes})


def bench(*arguments: str) -> int:
    return main(["bench", *arguments])


def measured(tmp_path: Path, *arguments: str, status: int = 0) -> tuple[schema.ResultFile, schema.EngineResult]:
    file = tmp_path / "result.json"
    assert bench(*arguments, "--json", str(file)) == status
    whole = schema.load(file)
    (result,) = whole.results
    assert isinstance(result, schema.EngineResult)
    return whole, result


# Arithmetic


def test_percentiles_lie_between_values() -> None:
    found = percentiles([4.0, None, 1.0, 2.0, 3.0, 5.0])
    assert found is not None
    assert (found.mean, found.p50, found.low, found.high) == (3.0, 3.0, 1.0, 5.0)
    assert found.p90 == pytest.approx(4.6, rel=1e-12)  # place 3.6 of 0..4
    assert found.p99 == pytest.approx(4.96, rel=1e-12)
    assert percentiles([7.0]) == schema.Percentiles(mean=7.0, p50=7.0, p90=7.0, p99=7.0, low=7.0, high=7.0)
    assert percentiles([None]) is None


RECORDS = [
    Record(1.0, 10, [1.5, 1.75, 2.5], finished=True),  # ttft 0.5, itl 0.25 0.75, tpot 0.5, e2e 1.5
    Record(2.0, 20, [3.0], finished=True),  # ttft 1, no tpot, e2e 1
    Record(4.0, 30, [4.25, 4.75, 5.0, 5.0, 5.25], finished=True),  # ttft 0.25, tpot 0.25, e2e 1.25
    Record(5.0, 40, [5.5], error="planted"),
    Record(6.0, 50),  # cut off
]


def test_latencies_of_a_made_up_run() -> None:
    found = latencies(RECORDS)
    assert {name: (p.mean, p.p50) for name, p in found.items() if p} == {
        "ttft": (1.75 / 3, 0.5),
        "itl": (2.0 / 6, 0.25),  # 0.25 0.75 0.5 0.25 0 0.25
        "tpot": (0.375, 0.375),
        "e2e": (1.25, 1.25),
    }
    assert latencies([]) == dict.fromkeys(("ttft", "itl", "tpot", "e2e"))


@pytest.mark.parametrize(
    ("slo", "count"),
    [
        ("ttft:500", 2),
        ("ttft:499", 1),
        ("tpot:250", 2),  # the request of one token has none to be late
        ("tpot:249", 1),
        ("e2el:1250", 2),
        ("ttft:500 tpot:500 e2el:1500", 2),
        ("ttft:500,e2el:1300", 1),
        ("e2el:1", 0),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(slo: str, count: int) -> None:
    assert good(RECORDS, parse_slo([slo])) == count


def test_a_summary_adds_up() -> None:
    run = Run(records=RECORDS, seconds=8.0)
    slo = parse_slo(["ttft:500"])
    about: Any = {"model": "m", "parameters": {}, "load_seconds": 1.0, "peak_memory_bytes": 5}
    result = summarise(run, protocol="serve", slo=slo, **about)
    assert (result.completed, result.failed) == (3, 1)
    assert (result.input_tokens, result.output_tokens) == (100, 10)  # of what had come: not the one cut off
    assert result.requests_per_second == 3 / 8
    assert result.output_tokens_per_second == 10 / 8
    assert result.total_tokens_per_second == 110 / 8
    assert result.goodput_per_second == 2 / 8
    batches = summarise(run, protocol="latency", batch_seconds=[2.0, 4.0], **about)
    assert batches.metrics["e2e"] == schema.Percentiles(mean=3.0, p50=3.0, p90=3.8, p99=3.98, low=2.0, high=4.0)
    assert batches.goodput_per_second is None


def test_runs_are_joined_one_after_the_other() -> None:
    whole = joined([Run(RECORDS[:1], seconds=4.0), Run(RECORDS[1:2], seconds=3.0, interrupted=True)])
    assert (whole.seconds, whole.interrupted) == (7.0, True)
    assert whole.records == [RECORDS[0], Record(6.0, 20, [7.0], finished=True)]


# Workloads


def test_arrivals_are_seeded_and_have_the_rate() -> None:
    times = arrivals(20_000, 5.0, seed=3)
    assert times == arrivals(20_000, 5.0, seed=3) != arrivals(20_000, 5.0, seed=4)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert 19_999 / times[-1] == pytest.approx(5.0, rel=0.03)
    assert arrivals(3, math.inf) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    times = torch.tensor(arrivals(40_000, 2.0, burstiness), dtype=torch.float64)
    gaps = times.diff()
    assert float(gaps.mean()) == pytest.approx(0.5, rel=0.05)
    assert float(gaps.var() / gaps.mean() ** 2) == pytest.approx(1 / burstiness, rel=0.1)


def test_random_prompts_have_exact_lengths_and_one_prefix() -> None:
    jobs = random_jobs(20, input_len=7, output_len=3, vocab_size=50, prefix_len=5, seed=1)
    assert {(len(job.prompt), job.output_len) for job in jobs} == {(12, 3)}
    assert len({tuple(job.prompt[:5]) for job in jobs}) == 1
    assert len({tuple(job.prompt[5:]) for job in jobs}) == 20
    assert {t for job in jobs for t in job.prompt} <= set(range(50))
    assert jobs == random_jobs(20, input_len=7, output_len=3, vocab_size=50, prefix_len=5, seed=1)
    assert jobs != random_jobs(20, input_len=7, output_len=3, vocab_size=50, prefix_len=5, seed=2)
    other = warmup_jobs(jobs, 3, vocab_size=50, seed=1)
    assert [len(job.prompt) for job in other] == [12] * 3
    assert not {tuple(job.prompt) for job in other} & {tuple(job.prompt) for job in jobs}


def test_random_lengths_fill_their_range() -> None:
    jobs = random_jobs(400, input_len=8, output_len=4, vocab_size=50, range_ratio=0.5, prefix_len=2)
    assert {len(job.prompt) - 2 for job in jobs} == set(range(4, 13))
    assert {job.output_len for job in jobs} == set(range(2, 7))
    assert min(job.output_len for job in random_jobs(50, input_len=1, output_len=1, vocab_size=9, range_ratio=0.9)) == 1


# Driving an engine


@pytest.fixture
def engine() -> LLMEngine:
    return LLMEngine(small(), max_num_seqs=8, num_pages=64)


def test_every_request_gets_its_tokens_and_their_times(engine: LLMEngine) -> None:
    jobs = random_jobs(6, input_len=9, output_len=5, vocab_size=256, range_ratio=0.5)
    times = [0.0, 0.0, 0.03, 0.03, 0.06, 0.06]
    run = drive(engine, jobs, times)
    assert [r.arrival for r in run.records] == times
    assert [len(r.times) for r in run.records] == [job.output_len for job in jobs]
    assert all(r.finished and r.times == sorted(r.times) and r.times[0] > r.arrival for r in run.records)
    assert run.seconds >= max(r.times[-1] for r in run.records)


def test_requests_beyond_the_concurrency_start_when_one_ends(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, under_way = engine.step, list[int]()

    def counted() -> list[RequestOutput]:
        under_way.append(engine.stats().scheduler.running + engine.stats().scheduler.waiting)
        return step()

    monkeypatch.setattr(engine, "step", counted)
    jobs = random_jobs(5, input_len=4, output_len=3, vocab_size=256)
    run = drive(engine, jobs, max_concurrency=1)
    ends = [r.times[-1] for r in run.records]
    assert [r.arrival for r in run.records] == [0.0, *ends[:-1]]
    assert max(under_way) == 1
    drive(engine, jobs, max_concurrency=2)
    assert max(under_way) == 2


def test_a_request_that_fails_is_counted(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.step

    def failing() -> list[RequestOutput]:
        outputs = step()
        for output in outputs:
            if output.request_id == "1" and output.finished:
                output.outputs[0] = replace(output.outputs[0], error="planted")
        return outputs

    monkeypatch.setattr(engine, "step", failing)
    run = drive(engine, random_jobs(3, input_len=4, output_len=2, vocab_size=256))
    assert [r.error for r in run.records] == [None, "planted", None]
    assert [r.finished for r in run.records] == [True, False, True]


# Commands


@pytest.mark.parametrize("model", [[], DUMMY, ["--dummy"]], ids=["tiny", "preset", "tiny-dummy"])
def test_latency(tmp_path: Path, capsys: Captured, model: list[str]) -> None:
    lengths = ["--input-len", "6", "--output-len", "4", "--batch-size", "3"]
    file, result = measured(tmp_path, "latency", *lengths, "--num-iters", "2", "--num-iters-warmup", "1", *model)
    assert (result.protocol, result.completed, result.failed) == ("latency", 6, 0)
    assert (result.input_tokens, result.output_tokens) == (36, 24)
    assert not file.interrupted
    assert file.command.startswith("grok-engine bench latency --input-len 6")
    assert file.environment == replace(environment.environment(), clock_mhz=file.environment.clock_mhz)
    e2e, ttft = result.metrics["e2e"], result.metrics["ttft"]
    assert e2e is not None
    assert ttft is not None
    assert e2e.mean * 2 == pytest.approx(result.duration_seconds)
    assert ttft.p99 < e2e.p99
    assert result.parameters["layers"] == (2 if model == DUMMY else 4)
    assert result.parameters["dummy"] is bool(model)
    out = capsys.readouterr().out
    for word in ("latency", "TTFT", "ITL", "TPOT", "E2E", "p50", "p90", "p99", "output tokens/s", "peak memory"):
        assert word in out


def test_throughput(tmp_path: Path) -> None:
    options = ["--num-prompts", "6", "--input-len", "8", "--output-len", "4", "--random-range-ratio", "0.5"]
    _, result = measured(tmp_path, "throughput", *options, *DUMMY)
    assert result.completed == 6
    assert result.requests_per_second == pytest.approx(6 / result.duration_seconds)
    assert 6 * 2 <= result.output_tokens <= 6 * 6  # not those of the warm-up


def test_serve(tmp_path: Path, capsys: Captured) -> None:
    traffic = "--num-prompts 8 --input-len 8 --output-len 4 --request-rate 200 --burstiness 2 --max-concurrency 4"
    slo = ["--goodput", "ttft:60000", "tpot:60000", "--goodput", "e2el:60000"]
    _, result = measured(tmp_path, "serve", *traffic.split(), *slo, *DUMMY)
    assert result.completed == 8
    assert result.slo == {"ttft_ms": 60000.0, "tpot_ms": 60000.0, "e2el_ms": 60000.0}
    assert result.goodput_per_second == pytest.approx(result.requests_per_second)
    assert result.duration_seconds > arrivals(8, 200.0, 2.0, seed=0)[-1]
    assert result.parameters["request_rate"] == 200.0
    assert "with ttft ms 60000, " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("protocol", ["latency", "throughput", "serve"])
def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    step, steps = LLMEngine.step, []

    def interrupted(self: LLMEngine) -> list[RequestOutput]:
        steps.append(1)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(LLMEngine, "step", interrupted)
    options = ["--input-len", "4", "--output-len", "5"]
    if protocol == "latency":
        options += ["--batch-size", "1", "--num-iters-warmup", "0"]
    else:
        options += ["--num-warmups", "0", "--max-num-seqs", "1", "--num-prompts", "9"]
    file, result = measured(tmp_path, protocol, *options, *DUMMY, status=130)
    assert file.interrupted
    assert (result.completed, result.output_tokens) == (1, 6)
    assert result.metrics["tpot"] is not None
    assert "requests completed 1 " in (out := " ".join(capsys.readouterr().out.split()))
    assert "interrupted" in out


def test_ctrl_c_before_the_measurement_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: LLMEngine) -> list[RequestOutput]:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLMEngine, "step", interrupted)
    assert bench("serve", *DUMMY, "--json", str(tmp_path / "result.json")) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["latency", "--model", "grok-1"], "'grok-1' has no weights here: give --dummy"),
        (["latency", "--model", "grok-9", "--dummy"], "'grok-9' is neither a folder nor one of tiny, grok-1"),
        (["latency", "--set", "d_ff=8"], "--set d_ff=8 needs --dummy"),
        (["latency", "--dummy", "--set", "d_ff"], "--set 'd_ff': expected NAME=VALUE"),
        (["latency", "--dummy", "--set", "d_fff=8"], "unknown key 'd_fff'"),
        (["latency", "--dummy", "--set", "d_model=many"], "d_model='many' is not an integer"),
        (["latency", "--batch-size", "65"], "--batch-size 65 is more than --max-num-seqs 64"),
        (
            ["latency", "--input-len", "500"],
            "a prompt and its answer have 628 tokens, more than max_model_len=512",
        ),
        (["latency", "--num-iters", "0"], "--num-iters"),
        (["latency", "--output-len", "40", "--num-pages", "2"], "needs 5 pages of keys and values, there are 2"),
        (["latency", "--json", "/nonexistent/result.json"], "there is no folder /nonexistent"),
        (["latency", "--dtype", "float16"], "float16"),
        (["throughput", "--num-prompts", "0"], "--num-prompts"),
        (["throughput", "--random-range-ratio", "1"], "--random-range-ratio"),
        (["serve", "--request-rate", "0"], "--request-rate"),
        (["serve", "--device", "quantum"], "device='quantum' cannot be used"),
        (["serve", "--burstiness", "2"], "--burstiness 2 without --request-rate"),
        (["serve", "--goodput", "ttfb:5"], "--goodput 'ttfb:5': expected NAME:MILLISECONDS"),
        (["serve", "--goodput", "ttft:soon"], "'ttft:soon'"),
        (["serve", "--goodput", "ttft:5", "ttft:6"], "'ttft:6': expected NAME:MILLISECONDS"),
        (["serve", "extra"], "unexpected argument 'extra'"),
        (["measure"], "No such command 'measure'"),
    ],
)
def test_bad_input_is_one_line_with_the_value(capsys: Captured, arguments: list[str], named: str) -> None:
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_too_little_memory_is_said_before_anything_is_allocated(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 64 << 30)
    assert bench("latency", "--model", "grok-1", "--dummy") == 2
    line = capsys.readouterr().err
    assert f"{weight_bytes(PRESETS['grok-1'], 'bfloat16') / 1e9:,.2f} GB" in line
    assert f"{(64 << 30) / 1e9:,.2f} GB" in line


def test_an_override_of_the_head_size_changes_the_scale_with_it() -> None:
    assert find_model("grok-1", dummy=True, overrides=["head_dim=64"])[0].model.attn_scale == 0.125
