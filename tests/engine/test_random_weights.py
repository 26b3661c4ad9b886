"""Random weights of any architecture: finite, seeded, of the sizes that were promised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from grok_engine import LLMEngine, ModelConfig
from grok_engine.checkpoint.random import repeated
from grok_engine.config import WeightFormat
from grok_engine.loading.fill import fill
from grok_engine.loading.random import random_bytes, random_checkpoint, weight_bytes
from grok_engine.models.decoder import Decoder
from grok_engine.models.families import PRESETS

SMALL = {"d_model": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position": 256}


def small(preset: str = "grok-1", **changes: Any) -> ModelConfig:
    config = PRESETS[preset]
    widths = {name: 64 for name in ("d_ff", "dense_d_ff") if getattr(config, name)}
    return replace(config, **{"num_layers": 2, "attn_scale": 0.0, **SMALL, **widths, **changes})


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("weights", get_args(WeightFormat))
def test_random_weights_give_finite_logits_that_depend_on_the_tokens(preset: str, weights: str) -> None:
    config = small(preset)
    engine = LLMEngine(config, weights=weights, dtype="float32", num_pages=8)
    logits = engine.logits([5, 6, 7, 8])
    assert logits.isfinite().all()
    assert logits.std() > 1e-3
    assert logits.argmax(-1).unique().numel() > 1
    held = sum(p.nbytes for p in engine.model.parameters())
    assert held == random_bytes(engine.model, engine.config.weights)
    assert held == weight_bytes(config, "float32", engine.config.weights)
    assert torch.equal(logits, LLMEngine(config, weights=weights, dtype="float32", num_pages=8).logits([5, 6, 7, 8]))


@pytest.mark.parametrize(("size", "start"), [(20, 3), (20, 0), (3, 5), (7, 6)])
def test_a_block_is_repeated_to_the_last_element(size: int, start: int) -> None:
    out = repeated(torch.arange(7), start, (1, size))
    assert out.tolist() == [[(start + i) % 7 for i in range(size)]]


def test_random_weights_are_as_seeded_and_fill_every_value() -> None:
    def parameters(seed: int) -> dict[str, torch.Tensor]:
        model = Decoder(small(), torch.bfloat16)
        calls: list[tuple[int, int]] = []
        fill(model, random_checkpoint(model, seed=seed), progress=lambda done, total: calls.append((done, total)))
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert calls[-1] == (random_bytes(model),) * 2
        return dict(model.named_parameters())

    first, same, other = parameters(0), parameters(0), parameters(1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layers.0.attn.o.values"], other["layers.0.attn.o.values"])
    matrices = [name for name, tensor in first.items() if tensor.dtype == torch.int8]
    assert len(matrices) == 8
    for name in matrices:
        values = first[name].float()
        assert 60 < values.std() < 110, name
        assert values.min() >= -127
    assert first["layers.0.feed_forward.w2.scales"].shape == (8, 8, 64)  # groups, as in the release
    assert first["layers.0.feed_forward.w13.scales"].shape == (8, 1, 128)
