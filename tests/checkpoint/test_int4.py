"""Rounding to 4 bits: how near it comes, and that every file of it means the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grok_engine import LLM
from grok_engine.checkpoint.rows import rounded
from grok_engine.config import ConfigError
from grok_engine.loading.convert import convert
from tests.checkpoint.hf_models import build
from tests.held import formats, held

TINY = Path(__file__).parents[1] / "data" / "gguf" / "llama-Q4_1.gguf"


@pytest.mark.parametrize("groups", [4, 16])
def test_scales_are_chosen_for_the_squared_error(groups: int) -> None:
    """Against amax / 7, and against a search a hundred times as fine."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(groups))
    q, scale = rounded(x.clone(), "int4", groups)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float16, (64, groups))
    assert (int(q.min()), int(q.max())) == (-8, 7)

    def errors(scale_NG1: torch.Tensor) -> torch.Tensor:
        w = x.unflatten(1, (groups, -1))
        codes = (w / scale_NG1).round().clamp(-8, 7)
        return (w - scale_NG1 * codes).square().sum(2)

    found = errors(scale.float()[..., None])
    w = x.unflatten(1, (groups, -1))
    assert torch.equal((w / scale.float()[..., None]).round().clamp(-8, 7).flatten(1), q.float())
    amax = w.abs().amax(2, keepdim=True)
    assert found.sum() <= 0.97 * errors(amax / 7).sum()
    peak = w.gather(2, w.abs().argmax(2, keepdim=True)) / -8
    finest = torch.stack([errors(peak * s) for s in torch.linspace(0.7, 1.3, 301).tolist()]).amin(0)
    assert found.sum() <= 1.01 * finest.sum()


def test_zeros_and_numbers_beyond_fp16() -> None:
    x = torch.zeros(3, 64)
    x[1, 5], x[2] = 3e5, 2.0**-40
    q, scale = rounded(x.clone(), "int4", 2)
    assert scale.isfinite().all()
    w = (q.unflatten(1, (2, 32)) * scale[..., None].float()).flatten(1)
    assert torch.equal(w[0], x[0])
    assert abs(w[1, 5] - x[1, 5]) <= 2e-3 * 3e5
    assert not w[2].any()


@pytest.mark.parametrize(("format", "weights"), [("packed", "int4"), ("gguf", "int4"), ("hf", "int4_g128")])
def test_every_file_holds_the_same_values(format: Any, weights: Any, tmp_path: Path) -> None:
    """Loaded so, converted and mapped, written for the hub and, in groups of 32, for llama.cpp."""
    build("Llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    expected = LLM(tmp_path / "model", dtype="float32", weights=weights, num_pages=4).model
    meant, own = dict(held(expected)), formats(expected)
    assert own.pop("embed") == "fp32"
    assert set(own.values()) == {"int4"}
    out = convert(tmp_path / "model", tmp_path / f"out.{format}", format=format, weights=weights, dtype="float32")
    found = dict(held(LLM(out, dtype="float32", num_pages=4, mmap=format == "packed").model))
    for name, values in found.items():
        if format == "packed" or name not in ("embed", "lm_head"):  # floats of the hub, 4 bits of llama.cpp
            assert torch.equal(values, meant[name]), name
    again = convert(out, tmp_path / f"again.{format}", format=format, dtype="float32")
    for name, values in held(LLM(again, dtype="float32", num_pages=4).model):
        assert torch.equal(values, found[name]), name


def test_a_device_without_the_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROK_KERNELS_BACKEND", "triton")
    with pytest.raises(ConfigError, match="weights='int4' on cpu: its kernels do not multiply by int4"):
        LLM(TINY, weights="int4")
