"""What a CPU reads to decode, by arithmetic of its own, and rates that are measured."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from grok_engine.models.families import PRESETS
from grok_engine.tools import plan_cpu as module
from grok_engine.tools.plan_cpu import Rates, measure, plan_cpu
from grok_engine.tools.plan_view import render_cpu

GROK = PRESETS["grok-1"]
SERVER = Rates.of(460)


def test_grok_1_in_int8_by_hand() -> None:
    """64 layers of 2 experts, attention and fp32 norms and router; the tied bf16 head; 2048 tokens of KV."""
    p = plan_cpu(GROK, SERVER, context=2048)
    d, f = 6144, 32768
    expert = 3 * d * f + 4 * (2 * f + d)  # int8, and an fp32 scale for each output
    rest = d * 8192 + 4 * 8192 + 6144 * d + 4 * d + 4 * d * (4 + 8)
    assert p.read_layers == 64 * (2 * expert + rest)
    assert p.read_head == 2 * 131072 * d
    assert p.read_kv == p.kv_bytes == 2048 * 256 * 1024
    assert p.weight_bytes == 64 * (8 * expert + rest) + 2 * 131072 * d
    assert p.step_s == pytest.approx((p.read_layers + p.read_head + p.read_kv) / 460e9)
    assert p.tokens_per_s == pytest.approx(5.4, abs=0.1)


def test_two_rates_share_the_bytes() -> None:
    p = plan_cpu(GROK, Rates(layers=50e9, other=100e9, measured=True), batch=3)
    assert p.step_s == pytest.approx(p.read_layers / 50e9 + (p.read_head + p.read_kv) / 100e9)
    assert p.tokens_per_s == pytest.approx(3 / p.step_s)


def test_a_batch_reads_the_experts_that_even_routing_hits() -> None:
    one, many = plan_cpu(GROK, SERVER, context=1), plan_cpu(GROK, SERVER, context=1, batch=2)
    per_share = one.read_layers - plan_cpu(replace(GROK, num_experts_per_tok=1), SERVER, context=1).read_layers
    assert many.read_layers - one.read_layers == pytest.approx(per_share * 8 * (0.25 * 0.75))
    assert many.read_kv == 2 * one.read_kv


def test_the_heads_format_is_its_own_matrix() -> None:
    bf16, int8 = plan_cpu(GROK, SERVER), plan_cpu(GROK, SERVER, head="int8")
    matrix = 131072 * (6144 + 4)
    assert int8.read_head == matrix
    assert int8.weight_bytes - bf16.weight_bytes == matrix  # the embedding stays beside it
    untied = replace(GROK, tie_embeddings=False)
    assert plan_cpu(untied, SERVER).weight_bytes - bf16.weight_bytes == 2 * 131072 * 6144


@pytest.mark.parametrize(("weights", "bits"), [("int4", 4.5), ("int4_g128", 4.125), ("bf16", 16), ("fp32", 32)])
def test_weights_at_their_bits(weights: Any, bits: float) -> None:
    p = plan_cpu(GROK, SERVER, weights=weights)
    active = 64 * (2 * 3 * 6144 * 32768 + 6144 * (8192 + 6144))
    assert p.read_layers == pytest.approx(active * bits / 8, rel=1e-3)


def test_a_window_bounds_what_is_read() -> None:
    mistral = PRESETS["mistral-7b"]
    assert plan_cpu(mistral, SERVER, context=32768).read_kv == plan_cpu(mistral, SERVER, context=4096).read_kv


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "int3"}, "weights='int3': expected one of int8"),
        ({"head": "q8"}, "head='q8': expected one of int8"),
        ({"kv": "int8"}, "kv='int8': expected one of bf16, fp8"),
        ({"context": 8193}, r"context=8193: expected 1\.\.8192"),
        ({"batch": 0}, "batch=0: expected a positive integer"),
    ],
)
def test_bad_values_say_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_cpu(GROK, SERVER, **change)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_is_a_positive_number(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="expected the memory bandwidth in GB/s, a positive number"):
        Rates.of(bandwidth)


def test_rates_are_of_weights_that_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_BYTES", 4 << 20)
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.0)
    for weights in ("int8", "fp8", "int4", "bf16", "fp32"):
        rates = measure(weights, "bf16")
        assert 1e6 < rates.layers < 1e13
        assert 1e6 < rates.other < 1e13
    assert rates.measured


def test_it_is_printed_and_goes_through_json() -> None:
    p, out = plan_cpu(GROK, SERVER, head="int8", context=1024), io.StringIO()
    render_cpu(p, Console(file=out, width=200, color_system=None))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for figure in (
        "315.7 B parameters",
        "head int8",
        f"at best {p.tokens_per_s:.3g} tokens/s",
        "83.01",
        "0.27 GB of KV",
    ):
        assert figure in text, figure
    again = json.loads(json.dumps(p.to_dict(), allow_nan=False))
    assert again["rates"]["layers"] == 460e9
    assert again["assumptions"] == list(p.assumptions)
