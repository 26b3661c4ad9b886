"""Every switch between the families, on small random decoders, against a second implementation in float64.

`expected` is written from the models' published formulas, token by token and head by head; it shares no code with the
engine and knows nothing of pages, chunks or fused weights.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from grok_engine.config import EngineConfig, ModelConfig
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.models.decoder import Decoder
from grok_engine.models.families import PRESETS
from grok_engine.runtime.plan import Entry
from grok_engine.runtime.runner import Runner
from grok_kernels import Spec

Weights = dict[str, np.ndarray]  # by name, (in, out), experts in front
TOKENS = [7, 3, 3, 39, 0, 12, 25, 7, 31, 18, 2, 39, 5]
BOUND = 1e-5  # ‖fp32 − fp64‖ / ‖fp64‖


# The second implementation


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def activate(x: np.ndarray, name: str) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(x)
    assert name == "gelu_tanh"
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softcap(x: Any, cap: float) -> Any:
    return cap * np.tanh(x / cap) if cap else x


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x))
    return e / e.sum()


def rotate(x: np.ndarray, position: int, c: ModelConfig) -> np.ndarray:
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * c.rope_theta ** (-2 * i / len(x)) / (c.rope_factors[i] if c.rope_factors else 1)
        out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        out[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attention(c: ModelConfig, w: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    tokens = len(x)
    q, k, v = ((x @ w[f"{prefix}.{name}"]).reshape(tokens, -1, c.head_dim) for name in "qkv")
    out = np.zeros((tokens, c.num_heads, c.head_dim))
    for head in range(c.num_heads):
        kv = head // (c.num_heads // c.num_kv_heads)
        for t in range(tokens):
            first = max(0, t - c.sliding_window + 1) if c.sliding_window else 0
            query = rotate(q[t, head], t, c)
            scores = np.array([c.attn_scale * (query @ rotate(k[j, kv], j, c)) for j in range(first, t + 1)])
            scores = softcap(scores, c.attn_softcap)
            if c.attn_temperature_len and t > c.attn_temperature_len:
                scores = scores * math.log2(t) / math.log2(c.attn_temperature_len)
            out[t, head] = softmax(scores) @ v[first : t + 1, kv]
    return out.reshape(tokens, -1) @ w[f"{prefix}.o"]


def gated(c: ModelConfig, x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return (activate(x @ gate, c.activation) * (x @ up)) @ down


def experts(c: ModelConfig, w: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        p = softmax(softcap(row @ w[f"{prefix}.router"], c.router_softcap))
        chosen = sorted(range(c.num_experts), key=lambda e: (-p[e], e))[: c.num_experts_per_tok]
        total = sum(p[e] for e in chosen) if c.renormalize else 1.0
        for e in chosen:
            gate, up, down = (w[f"{prefix}.{name}"][e] for name in ("gate", "up", "down"))
            out[t] += p[e] / total * gated(c, row, gate, up, down)
    return out


def feed_forward(c: ModelConfig, w: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    parts = []
    if c.num_experts:
        parts.append(experts(c, w, f"{prefix}.moe", x))
    if c.dense_d_ff:
        parts.append(gated(c, x, *(w[f"{prefix}.mlp.{name}"] for name in ("gate", "up", "down"))))
    return sum(parts) / math.sqrt(len(parts))


def expected(c: ModelConfig, w: Weights, tokens: list[int]) -> np.ndarray:
    h = w["embed"][tokens] * c.embedding_multiplier
    for i in range(c.num_layers):
        layer, norm = f"layers.{i}", f"layers.{i}.norm"
        for block, name in ((attention, "attn"), (feed_forward, "moe")):
            prefix = f"{layer}.attn" if name == "attn" else layer
            out = block(c, w, prefix, rms(h, w[f"{norm}.pre_{name}"], c.norm_eps))
            h = h + (rms(out, w[f"{norm}.post_{name}"], c.norm_eps) if c.post_norms else out)
    x = rms(h, w["final_norm"], c.norm_eps)
    logits = x @ (w["embed"].T if c.tie_embeddings else w["lm_head"])
    return softcap(logits * c.output_multiplier, c.final_softcap)


# Random decoders


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Fixed by the name, so that two configurations have equal weights wherever both have a weight."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape)
    if "norm" in name:
        x = 1 + 0.3 * x
    elif name.endswith((".q", ".k")):
        x *= 2.5 / math.sqrt(shape[-2])  # scores of several units: a softcap has something to cap
    elif name.endswith(".router"):
        x *= 3 / math.sqrt(shape[-2])
    elif name != "embed":
        x *= 1 / math.sqrt(shape[-2])
    return x.astype(np.float32).astype(np.float64)  # what an fp32 weight holds exactly


def build(c: ModelConfig) -> tuple[Decoder, Weights]:
    """A decoder in fp32 and its weights, filled by hand: no checkpoint, no loader."""
    model, w = Decoder(c, torch.float32), {}
    for module in model.modules():
        if isinstance(module, NamedTensor):
            module.allocate("cpu")
            shape = module.shape[::-1] if module.name.endswith(".router") else module.shape
            w[module.name] = draw(module.name, shape)
            value = w[module.name].T if module.name.endswith(".router") else w[module.name]
            module.weight.copy_(torch.from_numpy(value))
        elif isinstance(module, Embedding):
            module.allocate(Spec("fp32"), "cpu")
            w["embed"] = draw("embed", module.shape[1:])
            module.weight.values[0].copy_(torch.from_numpy(w["embed"]))
        elif isinstance(module, FusedWeight):
            module.allocate(Spec("fp32"), "cpu")
            for part in module.parts:
                shape = (module.experts, module.k, part.stop - part.start)
                w[part.name] = draw(part.name, shape if ".moe." in part.name else shape[1:])
                value = w[part.name].reshape(shape).swapaxes(1, 2)
                module.weight.values[:, part.start : part.stop].copy_(torch.from_numpy(value))
    return model, w


@torch.inference_mode()
def logits(model: Decoder, page_size: int = 16, chunk: int = 1024) -> np.ndarray:
    pages = range(-(-len(TOKENS) // page_size))
    config = EngineConfig(model=model.config, dtype="float32", page_size=page_size, num_pages=len(pages))
    runner = Runner(model, config)
    parts = [Entry(TOKENS[at : at + chunk], at, pages) for at in range(0, len(TOKENS), chunk)]
    return torch.cat([runner.logits(runner.run([work])) for work in parts]).double().numpy()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# All of Grok-1's kind, everything switched on that can be; and the plainest dense model
RICH = ModelConfig(
    vocab_size=40, d_model=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, num_experts=8,
    num_experts_per_tok=2, d_ff=20, dense_d_ff=28, activation="gelu", post_norms=True, attn_softcap=3.0,
    router_softcap=2.0, final_softcap=4.0, embedding_multiplier=2.0, output_multiplier=0.7, rope_theta=100.0,
    attn_temperature_len=4, sliding_window=6, tie_embeddings=False, max_position=32,
)  # fmt: skip
PLAIN = ModelConfig(
    vocab_size=40, d_model=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, dense_d_ff=28,
    activation="silu", post_norms=False, max_position=32,
)  # fmt: skip
SPARSE = replace(PLAIN, num_experts=8, num_experts_per_tok=2, d_ff=20, dense_d_ff=0)

FLIPS: list[tuple[ModelConfig, dict[str, Any]]] = [
    (RICH, {"post_norms": False}),
    (PLAIN, {"post_norms": True}),
    (RICH, {"attn_softcap": 0.0}),
    (PLAIN, {"attn_softcap": 2.0}),
    (RICH, {"router_softcap": 0.0}),
    (SPARSE, {"router_softcap": 1.0}),
    (RICH, {"final_softcap": 0.0}),
    (PLAIN, {"final_softcap": 2.0}),
    (SPARSE, {"renormalize": True}),
    (replace(RICH, post_norms=False), {"renormalize": True}),
    (RICH, {"embedding_multiplier": 1.0}),
    (PLAIN, {"embedding_multiplier": 3.0}),
    (RICH, {"output_multiplier": 1.0}),
    (PLAIN, {"output_multiplier": 0.5}),
    (RICH, {"tie_embeddings": True}),
    (PLAIN, {"tie_embeddings": False}),
    (RICH, {"attn_scale": 0.7}),
    (RICH, {"rope_theta": 1e6}),
    (PLAIN, {"rope_theta": 10.0}),
    (PLAIN, {"rope_factors": (1.0, 2.5, 4.0)}),
    (RICH, {"attn_temperature_len": 0}),
    (PLAIN, {"attn_temperature_len": 4}),
    (PLAIN, {"attn_temperature_len": 2}),
    (RICH, {"sliding_window": 0}),
    (PLAIN, {"sliding_window": 4}),
    (PLAIN, {"sliding_window": 1}),
    (PLAIN, {"activation": "gelu"}),
    (PLAIN, {"activation": "gelu_tanh"}),
    (RICH, {"activation": "gelu_tanh"}),
    (SPARSE, {"activation": "gelu_tanh"}),
    (SPARSE, {"num_experts_per_tok": 1}),
    (SPARSE, {"num_experts_per_tok": 3}),
    (SPARSE, {"num_experts_per_tok": 8}),
    (SPARSE, {"dense_d_ff": 28}),
    (RICH, {"dense_d_ff": 0}),
    (RICH, {"num_experts": 0, "num_experts_per_tok": 0, "d_ff": 0, "router_softcap": 0.0}),
    (PLAIN, {"norm_eps": 0.1}),
    (RICH, {"norm_eps": 0.1}),
    (PLAIN, {"num_layers": 3}),
    (PLAIN, {"num_kv_heads": 4}),
    (PLAIN, {"num_kv_heads": 1}),
]


@pytest.mark.parametrize(("base", "change"), FLIPS, ids=[f"{i}-{','.join(f[1])}" for i, f in enumerate(FLIPS)])
def test_switch(base: ModelConfig, change: dict[str, Any]) -> None:
    """Right on both sides of the switch, and different: the switch is wired to what it says."""
    config = replace(base, **change)
    assert config != base
    before, w_before = build(base)
    after, w_after = build(config)
    ours = logits(after)
    assert difference(ours, expected(config, w_after, TOKENS)) <= BOUND
    assert difference(logits(before), expected(base, w_before, TOKENS)) <= BOUND
    assert difference(ours, logits(before)) >= 10 * BOUND  # gelu and its tanh form are that close


def test_every_field_of_the_configuration_is_switched() -> None:
    silent = {"name", "max_position", "bos_token_id", "eos_token_ids"}  # say nothing about the forward pass
    sizes = {"vocab_size", "d_model", "num_heads", "head_dim"}  # a wrong one cannot load a checkpoint
    switched = {key for _, change in FLIPS for key in change}
    assert switched | silent | sizes == {f.name for f in fields(ModelConfig)}


def shrunk(preset: ModelConfig) -> ModelConfig:
    """A preset in every respect but the sizes, its ratio of heads kept; lengths so short that 13 tokens exceed them."""
    return replace(
        preset,
        vocab_size=40,
        d_model=24,
        num_layers=2,
        num_heads=2 * preset.num_heads // preset.num_kv_heads,
        num_kv_heads=2,
        head_dim=6,
        attn_scale=6**-0.5,
        d_ff=20 if preset.d_ff else 0,
        dense_d_ff=28 if preset.dense_d_ff else 0,
        sliding_window=5 if preset.sliding_window else 0,
        attn_temperature_len=4 if preset.attn_temperature_len else 0,
        max_position=32,
    )


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("page_size", "chunk"), [(16, 1024), (1, 1), (3, 4), (4, 5)])
def test_preset_shrunk(name: str, page_size: int, chunk: int) -> None:
    config = shrunk(PRESETS[name])
    model, w = build(config)
    assert difference(logits(model, page_size, chunk), expected(config, w, TOKENS)) <= BOUND


def test_shrunk_presets_differ_from_one_another() -> None:
    """The two Mixtrals too: their ratios of heads differ."""
    results = {name: logits(build(shrunk(c))[0]) for name, c in PRESETS.items()}
    names = list(results)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert difference(results[a], results[b]) > 0.01, (a, b)


def test_norm_of_an_untied_output_is_not_shared() -> None:
    """A tied model has no matrix of its own for the output, and an untied one does not fall back on the embedding."""
    assert "lm_head" not in build(replace(PLAIN, tie_embeddings=True))[1]
    model, w = build(replace(PLAIN, tie_embeddings=False))
    assert w["lm_head"].shape == (24, 40)
    before = logits(model)
    model.embed.weight.values[0, 11] += 1  # a token that the prompt does not have
    np.testing.assert_array_equal(logits(model), before)


def test_attention_temperature_starts_after_its_length() -> None:
    """Positions count from 0: the first with a factor other than 1 is len + 1."""
    with_it, without = (logits(build(replace(PLAIN, attn_temperature_len=n))[0]) for n in (4, 0))
    np.testing.assert_array_equal(with_it[:5], without[:5])
    assert all(difference(with_it[p], without[p]) > 1e-4 for p in range(5, len(TOKENS)))


@pytest.mark.parametrize("window", [1, 4])
def test_sliding_window_hides_older_keys_completely(window: int) -> None:
    """In one layer, the logits at p depend on tokens p − window + 1 … p and on no other; RoPE is relative."""
    config = replace(PLAIN, num_layers=1, sliding_window=window)
    model, w = build(config)
    last = logits(model)[-1]
    changed = [t if i >= len(TOKENS) - window else (t + 1) % 40 for i, t in enumerate(TOKENS)]
    nearly = [t if i > len(TOKENS) - window else (t + 1) % 40 for i, t in enumerate(TOKENS)]
    assert difference(last, expected(config, w, changed)[-1]) <= BOUND
    assert difference(last, expected(config, w, nearly)[-1]) > 1e-3
