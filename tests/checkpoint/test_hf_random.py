"""Random small models of each family, in each dtype, sharding and spelling: what transformers computes with them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from grok_engine import LLM, SamplingParams
from tests.checkpoint.hf_models import TOKENS, build, config_of, configure, error, judge

SEEDS = range(100 if os.environ.get("GROK_TEST_MORE") else 6)
FAMILIES = ("Llama", "Mistral", "Mixtral")
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def random_rope(rng: random.Random, theta: float) -> dict[str, Any]:
    kind = rng.choice(("default", "default", "linear", "dynamic", "llama3", "yarn"))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        rope["factor"] = rng.choice((1.0, 1.5, 4.0, 8.0))
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = rng.choice((16, 32, 64))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice((2.0, 4.0))}
    if kind == "yarn":
        optional = {
            "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.9, "truncate": False, "mscale": 0.7,
            "mscale_all_dim": 1.2,
        }  # fmt: skip
        rope |= {key: value for key, value in optional.items() if rng.random() < 0.3}
    return rope


def random_model(rng: random.Random) -> tuple[str, dict[str, Any]]:
    family = FAMILIES[rng.randrange(3)]
    heads = rng.choice((1, 2, 4, 6))
    head_dim = rng.choice((4, 8, 16, 20))
    width = heads * head_dim * rng.choice((1, 1, 2)) if rng.random() < 0.7 else heads * rng.choice((6, 10))
    config: dict[str, Any] = {
        "vocab_size": rng.choice((91, 96, 130)),
        "hidden_size": width,
        "intermediate_size": rng.choice((20, 33, 64)),
        "num_hidden_layers": rng.choice((1, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([g for g in (1, 2, 3, 4, 6) if heads % g == 0]),
        "head_dim": None if width == heads * head_dim and rng.random() < 0.5 else head_dim,
        "max_position_embeddings": rng.choice((32, 64, 100)),
        "rms_norm_eps": rng.choice((1e-5, 1e-6, 1e-3)),
        "tie_word_embeddings": rng.random() < 0.4,
        "hidden_act": rng.choice(("silu", "silu", "gelu", "gelu_pytorch_tanh", "gelu_new")),
        "bos_token_id": rng.choice((None, 1)),
        "eos_token_id": rng.choice((None, 2, [2, 7])),
        "rope_parameters": random_rope(rng, rng.choice((1e4, 1e6, 5e5))),
    }
    if family != "Llama":
        config["sliding_window"] = rng.choice((None, 3, 7, 4096))
    if family == "Mixtral":
        experts = rng.choice((1, 3, 4, 8))
        config |= {"num_local_experts": experts, "num_experts_per_tok": rng.randint(1, min(experts, 3))}
        config["head_dim"] = config["head_dim"] or head_dim  # with null, transformers 5.24 cannot scale Mixtral's rope
    return family, config


def respelled(values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The same values as another version or tool writes them."""
    values, rope = dict(values), dict(values["rope_parameters"])
    if rng.random() < 0.6:  # transformers 4.3x
        del values["rope_parameters"]
        values["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        names = rng.choice((("type",), ("rope_type",), ("type", "rope_type")))
        values["rope_scaling"] = {**dict.fromkeys(names, kind), **rope}
        if kind == "default":
            values["rope_scaling"] = rng.choice((None, {}, {"rope_type": "default"}))
    dtype = values.pop("dtype", None)
    values |= rng.choice(({"torch_dtype": dtype}, {"torch_dtype": "auto"}, {"torch_dtype": None}, {"dtype": dtype}, {}))
    if values.get("head_dim") is None or values["head_dim"] * values["num_attention_heads"] == values["hidden_size"]:
        values |= {"head_dim": None} if rng.random() < 0.5 else {}
        if values.get("head_dim") is None and rng.random() < 0.5:
            values.pop("head_dim", None)
    if rng.random() < 0.3:
        del values["architectures"]
    if values["model_type"] == "llama" and values["num_key_value_heads"] == values["num_attention_heads"]:
        values.pop("num_key_value_heads")
    for key in ("partial_rotary_factor", "attention_bias", "mlp_bias", "quantization_config", "layer_types"):
        if rng.random() < 0.2 and values.get(key) is None:
            values[key] = None
    if "num_local_experts" in values and rng.random() < 0.3:
        values["num_experts"] = values.pop("num_local_experts")
    values |= {"use_cache": False, "pretraining_tp": 1, "_name_or_path": "somewhere", "auto_map": {}}
    return dict(sorted(values.items(), key=lambda item: rng.random()))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_model(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    family, config = random_model(rng)
    folder, dtype = tmp_path / "model", rng.choice(list(DTYPES))
    model = build(family, **config).to(dtype)
    more = {"save_original_format": False} if family == "Mixtral" and rng.random() < 0.3 else {}
    model.save_pretrained(folder, max_shard_size=rng.choice(("1GB", "20KB", "5KB")), **more)
    theirs, greedy = judge(folder)
    configure(folder, respelled(config_of(folder), rng))
    said = f"{family} {json.dumps(config)} {(folder / 'config.json').read_text()}"
    llm = LLM(folder, dtype="float32", weights=rng.choice((None, "fp32")))
    assert error(llm.logits(TOKENS), theirs) <= 2e-5, said
    (output,) = llm.generate([TOKENS], SamplingParams(temperature=0, max_tokens=len(greedy), ignore_eos=True))
    assert list(output.outputs[0].token_ids) == greedy, said
