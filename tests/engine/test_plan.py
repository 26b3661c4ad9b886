from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from grok_engine.config import ModelConfig
from grok_engine.models.families import PRESETS
from grok_engine.tools.plan import PlanWeights, expert_layer_cost, plan, released_bytes, valid_gpu_counts
from grok_engine.tools.plan_view import render
from grok_kernels.chips import GPUS

GROK = PRESETS["grok-1"]
RELEASE = 318_239_886_140  # bytes of the released files
FILES = 770


def test_grok_1_as_published() -> None:
    p = plan(GROK, chip="h100-80gb", gpus=8)
    assert round(p.params_total / 1e9, 1) == 315.7
    assert round(p.params_active / 1e9, 1) == 83.8
    assert p.kv_bytes_per_token == 256 * 1024
    assert p.released_bytes == 318_239_694_848
    assert 0 < RELEASE - p.released_bytes < 500 * FILES  # what is left are the files' headers


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("mixtral-8x7b", 46.7, 12.9), ("mixtral-8x22b", 140.6, 39.1), ("mistral-7b", 7.24, 7.24), ("grok-2", 269.5, 115)],
)
def test_parameters_as_published(name: str, total: float, active: float) -> None:
    p = plan(PRESETS[name], chip="h200-141gb", gpus=8)
    assert p.params_total / 1e9 == pytest.approx(total, rel=0.002)
    assert p.params_active / 1e9 == pytest.approx(active, rel=0.003)
    assert p.released_bytes == 2 * p.params_total


def test_released_bytes_go_by_architecture_not_by_name() -> None:
    assert released_bytes(replace(GROK, name="a-folder")) == released_bytes(GROK)
    assert released_bytes(replace(GROK, num_layers=2)) is None
    assert released_bytes(PRESETS["grok-0"]) is None


def test_grok_1_in_int8_fits_eight_h100_and_not_four() -> None:
    eight, four = (plan(GROK, chip="h100-80gb", gpus=n) for n in (8, 4))
    assert eight.memory_bytes == 81559 << 20
    # int8 matrices and bf16 embedding over 8, and under 1% of scales, norms and routers
    shared = (GROK.param_count() + GROK.vocab_size * GROK.d_model) / 8
    assert shared < eight.weight_bytes < 1.01 * shared
    assert eight.kv_bytes == 8192 * 32 * 1024
    assert eight.fits
    assert eight.min_gpus == 8
    assert eight.headroom_bytes == pytest.approx(36.8e9, abs=0.1e9)
    assert eight.headroom_bytes == (eight.usable_bytes - eight.weight_bytes - eight.workspace_bytes - eight.kv_bytes)
    assert eight.kv_capacity_tokens == (eight.headroom_bytes + eight.kv_bytes) // eight.kv_bytes_per_token_gpu
    assert eight.max_requests == eight.kv_capacity_tokens // 8192 == 138
    assert not four.fits
    assert four.headroom_bytes == pytest.approx(-3.2e9, abs=0.1e9)
    assert four.kv_capacity_tokens == four.max_requests == 0
    assert plan(GROK, chip="h200-141gb", gpus=4).fits


def test_an_h200_is_an_h100_with_more_and_faster_memory() -> None:
    h100, h200 = GPUS["h100-80gb"], GPUS["h200-141gb"]
    assert (h200.memory, h200.bandwidth) == (143771 << 20, 4.8e12)
    assert replace(h200, name=h100.name, chip=h100.chip, memory=h100.memory, bandwidth=h100.bandwidth) == h100


def test_grok_1_in_bf16_is_held_by_no_eight_h100() -> None:
    assert plan(GROK, chip="h100-80gb", gpus=8, weights="bf16").min_gpus == 16
    assert plan(GROK, chip="a100-40gb", gpus=8, weights="bf16").min_gpus is None


@pytest.mark.parametrize(
    ("model", "chip", "weights", "gpus"),
    [("grok-1", "h100-80gb", "int8", 8), ("mistral-7b", "h100-80gb", "int8", 1), ("grok-1", "a100-40gb", "bf16", 16)],
)
def test_without_a_number_of_gpus_it_is_the_fewest_that_hold_it(
    model: str, chip: str, weights: PlanWeights, gpus: int
) -> None:
    """Or all that can share it, where none do. Eight do not divide every model."""
    assert plan(PRESETS[model], chip=chip, weights=weights).gpus == gpus


@pytest.mark.parametrize(
    ("tokens", "floor"), [(1, 403e-6), (8, 1.45e-3), (32, 1.61e-3), (1024, 1.71e-3), (4096, 6.8e-3), (8192, 13.6e-3)]
)
def test_floor_of_an_expert_layer(tokens: int, floor: float) -> None:
    seconds = expert_layer_cost(GROK, tokens, "fp8").floor(bandwidth=3.0e12, peak=1450e12, bf16=800e12)
    assert max(seconds) == pytest.approx(floor, rel=0.005)


def test_the_decode_step_is_built_from_that_floor() -> None:
    h100 = GPUS["h100-80gb"]
    experts = expert_layer_cost(GROK, 1, "fp8", 8) * GROK.num_layers
    step = plan(GROK, chip="h100-80gb", gpus=8, weights="fp8", context=1).decode
    # beside the experts: attention and the output head, 6.5 B of 83.8 B parameters, the head in 2 bytes
    rest = (GROK.active_param_count() - 3 * 2 * 64 * 6144 * 32768 + GROK.vocab_size * GROK.d_model) / 8 / h100.bandwidth
    assert step.memory_s == pytest.approx(experts.read_bytes / h100.bandwidth + rest, rel=0.01)
    assert step.total_s == max(step.memory_s, step.compute_s) + step.link_s
    assert step.tokens_per_s == pytest.approx(1 / step.total_s)


def test_prefill_counts_every_operation() -> None:
    one = replace(GROK, num_layers=1, vocab_size=16)
    p = plan(one, chip="h100-80gb", gpus=1, weights="bf16", context=5000)
    linear = 2 * (one.active_param_count() - 5 * 6144 - 16 * 6144 + 6 * 6144) * 5000
    scores = 4 * 6144 * 5000 * 5001 // 2
    assert p.prefill.compute_s == pytest.approx((linear + scores) / GPUS["h100-80gb"].bf16, rel=1e-3)


def test_prefill_scores_no_more_than_the_window() -> None:
    mistral = replace(PRESETS["mistral-7b"], sliding_window=100)

    def scores(context: int) -> float:
        full = replace(mistral, sliding_window=0)
        times = [plan(c, chip="h100-80gb", gpus=1, context=context).prefill.compute_s for c in (full, mistral)]
        return (times[0] - times[1]) * 989.5e12 / (4 * 32 * 4096)

    assert scores(100) == pytest.approx(0, abs=1)
    assert scores(5000) == pytest.approx(sum(max(0, t - 100) for t in range(1, 5001)), rel=1e-6)


def test_prefill_reads_no_more_than_the_window() -> None:
    mistral = replace(PRESETS["mistral-7b"], sliding_window=100)
    full = replace(mistral, sliding_window=0)
    times = [plan(c, chip="h100-80gb", gpus=1, context=4096).prefill.memory_s for c in (full, mistral)]
    # the second step of 2048 tokens looks back on 100 instead of 2048
    assert (times[0] - times[1]) * 3.35e12 == pytest.approx(1948 * 128 * 1024, rel=1e-6)


def test_workspace_is_the_stated_formula() -> None:
    p = plan(GROK, chip="h100-80gb", gpus=8, batch=3)
    wide = 4 * 6144 + 2 * 768 + 2 * 128 + 2 * (3 * 4096 + 2 * 6144)
    assert p.workspace_bytes == 2 * 2048 * wide + 2 * 3 * 4 * 131072
    assert plan(GROK, chip="h100-80gb", gpus=8, context=7).workspace_bytes == 2 * 7 * wide + 2 * 4 * 131072


@pytest.mark.parametrize(("gpus", "rate"), [(8, 450e9), (16, 50e9)])
def test_links_carry_two_all_reduces_a_layer_and_the_logits(gpus: int, rate: float) -> None:
    p = plan(GROK, chip="h100-80gb", gpus=gpus, batch=4)
    share = (gpus - 1) / gpus
    reduced, gathered = 2 * 64 * 2 * (4 * 6144 * 2) * share, 4 * 131072 * 4 * share
    assert p.decode.link_s == pytest.approx((reduced + gathered) / rate + 129 * 5e-6)
    assert plan(GROK, chip="h100-80gb", gpus=1).decode.link_s == 0


def test_a_window_bounds_the_cache() -> None:
    p, short = (plan(PRESETS["mistral-7b"], chip="l40s-48gb", gpus=1, context=n) for n in (32768, 1000))
    assert (p.kv_tokens_per_request, short.kv_tokens_per_request) == (4096, 1000)
    assert p.kv_bytes == 4096 * p.kv_bytes_per_token
    assert any("window" in line and "4096" in line for line in p.assumptions)


def test_kv_heads_are_copied_beyond_their_number() -> None:
    eight, sixteen = (plan(GROK, chip="h100-80gb", gpus=n, kv="fp8") for n in (8, 16))
    assert eight.kv_bytes_per_token == sixteen.kv_bytes_per_token == 2 * 64 * 8 * (128 + 4)
    assert eight.kv_bytes_per_token_gpu == sixteen.kv_bytes_per_token_gpu == 2 * 64 * (128 + 4)
    assert any("copied over 16" in line for line in sixteen.assumptions)


def test_formats_the_chip_cannot_compute_run_at_the_peak_of_bf16() -> None:
    a100, h100 = GPUS["a100-80gb"], GPUS["h100-80gb"]
    assert a100.peak("fp8") == a100.bf16 == a100.peak("int8")
    assert (h100.peak("fp8"), h100.peak("int8"), h100.peak("bf16")) == (1979e12, 989.5e12, 989.5e12)
    assert any(
        "a100-80gb has none in fp8" in x for x in plan(GROK, chip="a100-80gb", gpus=8, weights="fp8").assumptions
    )


def test_valid_counts_divide_the_model() -> None:
    assert valid_gpu_counts(GROK) == (1, 2, 4, 8, 16)
    three = ModelConfig(
        vocab_size=8, d_model=12, num_layers=1, num_heads=6, num_kv_heads=3, head_dim=2, dense_d_ff=24
    )  # fmt: skip
    assert valid_gpu_counts(three) == (1, 3, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chip": "h100"}, r"gpu='h100': expected one of .*h100-80gb"),
        ({"gpus": 3}, r"gpus=3: expected one of 1, 2, 4, 8, 16.*num_heads=48.*d_ff=32768"),
        ({"gpus": 0}, r"gpus=0: expected a positive integer"),
        ({"gpus": 8.0}, r"gpus=8\.0"),
        ({"gpus": True}, r"gpus=True"),
        ({"weights": "int4"}, r"weights='int4': expected one of int8, fp8, bf16"),
        ({"kv": "int8"}, r"kv='int8': expected one of bf16, fp8"),
        ({"context": 8193}, r"context=8193: expected 1\.\.8192"),
        ({"context": 0}, r"context=0"),
        ({"batch": 0}, r"batch=0"),
        ({"batch": 1.5}, r"batch=1\.5"),
    ],
)
def test_bad_values_say_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(GROK, **{"chip": "h100-80gb", "gpus": 8, **change})


CASES = {
    "config": st.sampled_from(list(PRESETS.values())),
    "chip": st.sampled_from(list(GPUS)),
    "weights": st.sampled_from(["int8", "fp8", "bf16"]),
    "kv": st.sampled_from(["bf16", "fp8"]),
    "context": st.integers(1, 8192),
    "batch": st.integers(1, 4096),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=st.fixed_dictionaries(CASES))
def test_more_gpus_hold_no_less(case: dict[str, Any]) -> None:
    plans = [plan(gpus=n, **case) for n in valid_gpu_counts(case["config"])]
    for fewer, more in itertools.pairwise(plans):
        assert more.kv_capacity_tokens >= fewer.kv_capacity_tokens
        assert more.headroom_bytes >= fewer.headroom_bytes
        assert more.weight_bytes <= fewer.weight_bytes
    least = plans[0].min_gpus
    assert all(p.fits == (least is not None and p.gpus >= least) for p in plans)
    assert all(p.fits == (p.max_requests >= p.batch) for p in plans)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=st.fixed_dictionaries(CASES), more=st.integers(1, 512))
def test_more_work_takes_no_less(case: dict[str, Any], more: int) -> None:
    small = plan(gpus=8, **case)
    wide = plan(gpus=8, **{**case, "batch": case["batch"] + more})
    assert wide.decode.total_s >= small.decode.total_s
    assert wide.decode.memory_s >= small.decode.memory_s
    assert wide.headroom_bytes < small.headroom_bytes
    assert wide.kv_capacity_tokens <= small.kv_capacity_tokens
    if case["context"] + more <= 8192:
        long = plan(gpus=8, **{**case, "context": case["context"] + more})
        assert long.decode.total_s >= small.decode.total_s
        assert long.prefill.total_s > small.prefill.total_s
        assert long.headroom_bytes <= small.headroom_bytes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=st.fixed_dictionaries({k: v for k, v in CASES.items() if k not in ("weights", "kv")}))
def test_smaller_formats_need_no_more(case: dict[str, Any]) -> None:
    bf16, int8, fp8 = (plan(gpus=8, weights=w, **case) for w in ("bf16", "int8", "fp8"))
    assert bf16.weight_bytes > int8.weight_bytes >= fp8.weight_bytes
    assert bf16.decode.memory_s > int8.decode.memory_s >= fp8.decode.memory_s
    assert bf16.prefill.compute_s == int8.prefill.compute_s >= fp8.prefill.compute_s
    assert plan(gpus=8, kv="fp8", **case).kv_bytes < plan(gpus=8, kv="bf16", **case).kv_bytes


def test_a_plan_goes_through_json() -> None:
    p = plan(GROK, chip="h100-80gb", gpus=4)
    again = json.loads(json.dumps(p.to_dict(), allow_nan=False))
    assert again["released_bytes"] == p.released_bytes
    assert again["fits"] is False
    assert again["decode"]["total_s"] == p.decode.total_s
    assert again["assumptions"] == list(p.assumptions)


@pytest.mark.parametrize("gpus", [4, 8])
def test_render_prints_the_figures_in_100_columns(gpus: int) -> None:
    p, out = plan(GROK, chip="h100-80gb", gpus=gpus, batch=32), io.StringIO()
    render(p, Console(file=out, width=200, color_system=None))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    verdict = "verdict does not fit, " if gpus == 4 else "verdict fits, "
    figures = (
        "315.7 B parameters",
        "83.8 B active",
        "318.2 GB as released",
        "256 KiB a token",
        "fewest GPUs that hold it: 8",
    )
    for figure in (
        *figures,
        f"{gpus} x h100-80gb",
        f"{p.kv_capacity_tokens:,} tokens",
        f"{p.decode.tokens_per_s:,.0f}",
    ):
        assert figure in text, figure
    assert f"{abs(p.headroom_bytes) / 1e9:.1f} GB a GPU" in text
    words = " ".join(text.split())
    assert verdict in words
    assert all(" ".join(line.split()) in words for line in p.assumptions)


def test_render_prints_a_folder_name_as_it_is() -> None:
    out = io.StringIO()
    render(plan(replace(GROK, name="my[red]grok"), chip="h100-80gb", gpus=8), Console(file=out, width=100))
    assert "my[red]grok" in out.getvalue()


def test_render_uses_colour_on_a_terminal() -> None:
    out = io.StringIO()
    render(
        plan(GROK, chip="h100-80gb", gpus=8), Console(file=out, width=100, force_terminal=True, color_system="standard")
    )
    assert "\x1b[1;32mfits" in out.getvalue()
