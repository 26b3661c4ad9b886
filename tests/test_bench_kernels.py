"""The kernels' suite runs once at tiny sizes; its registry and its command line. No time is looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import grok_kernels
from grok_bench.kernels import case, cases, contestant, data, gemm, harness, ours
from grok_bench.kernels.data import Rows, routing
from grok_bench.kernels.problems import FAMILIES, Problem, ops, select
from grok_bench.kernels.sets import SETS
from grok_bench.kernels.shapes import MODELS, names, shape
from grok_bench.schema import KernelResult, load
from grok_engine.cli import main
from grok_engine.models.families import PRESETS
from grok_kernels.reference.quantize import dequantize_weight


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A registry without what other tests put there, a cache of its own, and as many threads as before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(contestant, "_contestants", {})
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(path: Path) -> list[KernelResult]:
    return load(path).kernels


# Every format and kind of problem, and every contestant of a CPU, at sizes that take no time
EVERYTHING = (
    "*/grok-1/*/t4", "sandwich_norm/mixtral-8x7b/decode/t4", "rope_store_kv/grok-1/decode/*-p16-t4",
    "paged_attention/grok-[12]/*/*-p16-[bq]*-l256", "paged_attention/mixtral-8x7b/decode/bf16-p16-b1-l256",
    "group_tokens/grok-1/decode/*-t4", "grouped_gemm/grok-1/decode/w13-*-even-t4",
    "grouped_gemm/grok-1/decode/w13-int8-*-t4", "grouped_gemm/grok-1/decode/[qo]*-t4",
    "moe/grok-1/decode/[bf]*-even-t4", "moe/grok-1/decode/int8*-even-t4", "moe/grok-1/decode/int4_k*-even-t4",
    "moe/grok-1/decode/int8-*-t1", "moe/mixtral-8x7b/decode/fp8-even-t4",
    "moe_fp8/grok-1/decode/*-t4", "sample_top_p/grok-1/decode/b[12]",
)  # fmt: skip


def test_everything_runs_and_ours_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    status = main(["bench", "kernels", *EVERYTHING, "--smoke", "--threads", "1", "--samples", "--json", str(file)])
    assert status == 0, capsys.readouterr().out
    found = load(file)
    assert found.environment.threads == 1
    assert not found.interrupted
    assert found.command.startswith("grok-engine bench kernels")
    assert {r.op for r in results(file)} == set(ops())
    formats = {r.parameters["format"] for r in results(file) if r.op == "grouped_gemm"}
    assert formats == set(gemm.FORMATS)
    for result in results(file):
        ours = [s for s in result.scores if s.ours and s.status != "missing"]
        assert ours, result.problem
        assert result.rounds == 2
        for s in result.scores:
            if s.status != "ok":  # an 8-bit peer may be wrong on a CPU that saturates, and is not timed then
                assert not s.ours or s.status == "missing", (result.problem, s)
                assert s.status in ("missing", "wrong"), (result.problem, s)
                assert s.message or s.status == "wrong"
                assert s.seconds is None
                continue
            assert s.error is not None and s.error <= (s.tolerance or result.tolerance)  # noqa: PT018
            assert s.seconds and s.low and s.high and s.roofline  # noqa: PT018
            assert s.low <= s.seconds <= s.high
            assert len(s.samples) == 2
    assert main(["bench", "compare", str(file), str(file)]) == 0
    assert main(["bench", "report", str(file)]) == 0
    assert "moe/grok-1-smoke/decode/fp8-even-t4" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu", "cuda", "quick"])
def test_the_sets_cover_every_op(name: str) -> None:
    other = {"quantize_fp8" if name == "cpu" else "quantize_int8"}
    only_on_gpus = set() if name.startswith("cuda") else {"route_and_group", "sandwich_norm_fp8", "moe_fp8"}
    assert {p.op for p in select(SETS[name])} >= set(ops()) - other - only_on_gpus
    assert len(select(SETS[name])) < 120


def test_the_registry_has_what_it_says() -> None:
    everything = select([])
    all_names = [p.name for p in everything]
    assert len(set(all_names)) == len(all_names) == sum(len(list(family)) for family in FAMILIES)
    assert {p.op for p in everything} == {op for op in dir(grok_kernels.ops) if op in grok_kernels.backends()}
    assert {p.model for p in everything} == set(names())
    tokens = {p.number("tokens") for p in everything if p.op == "moe"}
    assert (min(tokens), max(tokens)) == (1, 16384)
    contexts = {p.number("context") for p in everything if p.op == "paged_attention"}
    assert (min(contexts), max(contexts)) == (128, 131072)
    for p in select(["moe/grok-2/prefill/fp8dyn-zipf-t512"]):
        assert (p.model, p["format"], p["routing"], p["tokens"]) == ("grok-2", "fp8dyn", "zipf", 512)


def test_shapes_are_the_presets_and_their_twins_have_the_same_ratios() -> None:
    for model in MODELS:
        whole, quarter, shard = (shape(model + scale) for scale in ("", "-quarter", "-tp8"))
        assert whole is PRESETS[model]
        for field in ("d_model", "num_heads", "num_kv_heads", "d_ff", "vocab_size", "dense_d_ff"):
            assert getattr(quarter, field) * 4 == getattr(whole, field)
            assert getattr(shard, field) * (1 if field == "d_model" else 8) == getattr(whole, field)
        for same in ("num_experts", "activation", "attn_softcap", "renormalize", "head_dim"):
            assert getattr(quarter, same) == getattr(shard, same) == getattr(whole, same)


def test_names_select_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "moe/grok-1/decode/fp8-even-*", "rms_norm/grok-2/*/t?"]) == 0
    lines = capsys.readouterr().out.split()
    assert len(lines) == 9 + 4
    assert lines[::9] == ["moe/grok-1/decode/fp8-even-t1", "rms_norm/grok-2/decode/t1"]  # as they were asked for
    assert main(["bench", "--list", "@quick"]) == 0
    assert set(capsys.readouterr().out.split()) == {p.name for p in select(SETS["quick"])}
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{op}/MODEL/" in out for op in ops())
    assert "zipf" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope/*"], "no problem matches 'nope/*': names are OP/MODEL/PHASE/DETAILS, of ops paged_att"),
        (["@none"], "'@none' is no set of problems: expected @cpu, @cuda-first, @cuda-compiling, @cuda, @quick"),
        (["rms_norm/grok-1/decode/t1", "--contestant", "Flash"], "no contestant matches 'Flash': there are grok"),
        (["--device", "tpu"], "there is no device 'tpu' here: expected one of cpu"),
        (["--plugin", "PLUGIN"], "NameError: name 'undefined' is not defined"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_told_with_what_there_is(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text("undefined")
    assert main(["bench", "kernels", *(str(plugin) if a == "PLUGIN" else a for a in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_what_does_not_fit_is_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grok_bench.kernels.device.available_bytes", lambda name: 100_000_000)
    file, name = tmp_path / "found.json", "moe/grok-1/decode/int8-even-t1"
    options = ["--threads", "1", "--seconds", "0.1", "--json", str(file), "--contestant", "torch eager"]
    monkeypatch.setattr("grok_bench.kernels.device.SETTLE", 0.01)
    monkeypatch.setattr("grok_bench.kernels.device.last_cache_bytes", lambda: 1 << 20)
    assert main(["bench", "kernels", name, "group_tokens/grok-1/prefill/even-t4096", *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"skipped: {name}: needs 1\d\.\d GB on cpu, 0\.1 GB are available", out)
    assert [r.problem for r in results(file)] == ["group_tokens/grok-1/prefill/even-t4096"]


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = 0

    def interrupted(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 4:  # in the second problem, after its first round
            raise KeyboardInterrupt
        return taken(*args)

    taken = harness._round
    monkeypatch.setattr(harness, "_round", interrupted)
    file = tmp_path / "found.json"
    arguments = ["rms_norm/grok-1/decode/t[14]", "--smoke", "--threads", "1", "--json", str(file)]
    assert main(["bench", "kernels", *arguments]) == 130
    assert "what was measured so far is kept" in capsys.readouterr().out
    assert load(file).interrupted
    assert [(r.problem, r.rounds) for r in results(file)] == [
        ("rms_norm/grok-1-smoke/decode/t1", 2), ("rms_norm/grok-1-smoke/decode/t4", 1),
    ]  # fmt: skip


def test_routings_have_the_loads_they_promise() -> None:
    torch.manual_seed(0)
    rows = [Rows.of(routing(kind, 1024, 8, 2, 0), 8) for kind in ("even", "zipf", "one")]
    counts = [[b - a for a, b in pairwise(r.bounds)] for r in rows]
    assert counts[0] == [256] * 8
    assert counts[1][0] > counts[1][1] > counts[1][3] > counts[1][7] > 0
    assert counts[1][0] > 4 * counts[1][7]
    assert counts[2] == [2048, 0, 0, 0, 0, 0, 0, 0]
    assert rows[2].hit == [0]
    turned = Rows.of(routing("one", 1024, 8, 2, 1), 8)
    assert turned.hit == [2]
    zipf = routing("zipf", 1024, 8, 2, 0)
    assert bool((zipf[:, 0] != zipf[:, 1]).all())


@pytest.mark.parametrize("fmt", data.GROUPED)
def test_weights_by_groups_are_those_of_the_ops_and_counted_at_their_own_bits(fmt: str) -> None:
    n, k = 64, 512
    drawn = data.Weights.random(2, n, k, fmt)
    (weight,) = ours.arguments([drawn])
    (packed,) = ours.arguments([drawn], packs=True)
    assert packed.layout == "panels"
    assert weight.nbytes == data.weight_bytes(fmt, k, in_rows=True) * 2 * n * k
    assert packed.nbytes == data.weight_bytes(fmt, k) * 2 * n * k
    torch.testing.assert_close(drawn.float(1), dequantize_weight(weight, 1), rtol=1e-6, atol=1e-6)
    assert 0.5 < float(drawn.float(0).norm()) / n**0.5 < 2  # so that a product with normal rows is about normal
    assert data.spec(fmt, 96).columns(96) in (16, 32, 96)  # where a group does not divide the columns


def test_errors_are_relative_and_of_whole_numbers_a_share() -> None:
    one = torch.ones(4)
    assert case.error(one * 1.01, one) == pytest.approx(0.01, rel=1e-3)
    assert case.error(torch.tensor([1, 2, 3, 5]), torch.tensor([1, 2, 3, 4])) == 0.25
    assert case.error((one, torch.tensor([1])), (one, torch.tensor([2]))) == 1.0
    for bad in (torch.ones(5), torch.tensor([1.0, 1.0, 1.0, float("nan")]), None, (one,)):
        assert case.error(bad, one) == float("inf")


def test_calls_take_other_data_until_the_caches_are_cold() -> None:
    problem = small("moe/grok-1/decode/int8-even-t1")
    warm, cold = cases.build(problem, "cpu"), cases.build(problem, "cpu", cold=5_000_000)
    weights = {id(i.w13.values) for i in cold.inputs}
    assert len({id(i.w13.values) for i in warm.inputs}) == 1
    assert len(weights) == -(-5_000_000 // (8 * 3 * 128 * 128))
    hit = [tuple(sorted(set(i.experts.flatten().tolist()))) for i in warm.inputs]
    assert len(set(hit)) == len(hit) == case.TURNS  # one token's experts are others in each
    norms = cases.build(small("rms_norm/grok-1/decode/t4"), "cpu", cold=100_000)
    assert len(norms.inputs) == -(-100_000 // (2 * 4 * 128 * 2 + 4 * 128))
    assert len({i.args[0].data_ptr() for i in norms.inputs}) == len(norms.inputs)


def small(pattern: str) -> Problem:
    (problem,) = select([pattern])
    return problem.small()
