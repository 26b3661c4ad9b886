"""What a round serves with: a small model with random weights or the one that ships, and an engine's options."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from grok_engine import ModelConfig
from grok_engine.loading import convert
from grok_engine.loading.random import random_checkpoint
from grok_engine.loading.resolve import resolve_model
from grok_engine.models.decoder import Decoder

LONGEST = 96  # tokens of a request, prompt and answer
ALONE: dict[str, Any] = {  # of the engine that serves one request at a time; everything else is the round's
    "max_num_seqs": 1, "max_num_batched_tokens": LONGEST, "enforce_eager": True, "enable_prefix_caching": False,
    "num_pages": None, "max_waiting": 64, "page_size": 16,
}  # fmt: skip


def draw_model(rng: random.Random) -> ModelConfig:
    """A decoder with any mixture of the families' features, small enough for a step of 2 ms."""
    feed_forward = rng.choice(["experts", "experts", "dense", "both"])
    heads, kv_heads = rng.choice([(4, 1), (4, 2), (2, 2), (6, 3)])
    routed: dict[str, Any] = {}
    if feed_forward != "dense":
        experts = rng.choice([2, 4, 8])
        routed = {
            "num_experts": experts, "num_experts_per_tok": rng.choice([1, 2, 2, experts]), "d_ff": rng.choice([32, 72]),
            "router_softcap": rng.choice([0.0, 30.0]), "renormalize": rng.random() < 0.5,
        }  # fmt: skip
    return ModelConfig(
        name="random",
        vocab_size=1536 + rng.choice([0, 9]),  # some models have more tokens than their tokenizer
        d_model=rng.choice([32, 48, 64]), num_layers=rng.choice([1, 2, 3]), num_heads=heads, num_kv_heads=kv_heads,
        head_dim=rng.choice([8, 16, 32]), dense_d_ff=0 if feed_forward == "experts" else rng.choice([32, 80]),
        activation=rng.choice(["gelu_tanh", "gelu", "silu"]), post_norms=rng.random() < 0.5,
        attn_softcap=rng.choice([0.0, 30.0]), final_softcap=rng.choice([0.0, 0.0, 50.0]),
        output_multiplier=rng.choice([1.0, 2.5]), attn_temperature_len=rng.choice([0, 0, 20]),
        sliding_window=rng.choice([0, 0, 24]), tie_embeddings=rng.random() < 0.5, max_position=LONGEST, **routed,
    )  # fmt: skip


def draw_options(rng: random.Random, packed: bool) -> dict[str, Any]:
    """Options with little room: few sequences, few tokens a step, hardly more pages than the longest request takes."""
    seqs, page_size = rng.choice([2, 5, 12]), rng.choice([1, 3, 4, 16])
    return {
        "dtype": rng.choice(["float32", "bfloat16"]), "kv_dtype": rng.choice([None, None, "fp8_e4m3"]),
        "weights": None if packed else rng.choice([None, "bf16"]), "mmap": packed and rng.random() < 0.3,
        "max_model_len": LONGEST, "page_size": page_size, "max_num_seqs": seqs,
        "max_num_batched_tokens": seqs + rng.choice([0, 7, 60]),
        "num_pages": -(-int(LONGEST * rng.choice([1.1, 1.5, 3])) // page_size),
        "enable_prefix_caching": rng.random() < 0.8, "enforce_eager": rng.random() < 0.3,
        "max_waiting": rng.choice([6, 64, 64]), "seed": rng.choice([None, 5]),
    }  # fmt: skip


def write_model(config: ModelConfig, folder: Path, rng: random.Random, dtype: str) -> Path:
    """A converted model of random weights, with the tokenizer of the small one."""
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config.to_dict()))
    shutil.copy(resolve_model("tiny") / "tokenizer.model", source)
    weights = random_checkpoint(Decoder(config, torch.float32, max_positions=1), rng.choice([None, "bf16", "fp8"]))
    with mock.patch.object(convert, "open_checkpoint", return_value=weights):
        return convert.convert(source, folder / "model", dtype=dtype)
