from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grok_engine.config import ACTIVATIONS, ConfigError, EngineConfig, EngineOptions, ModelConfig, described
from grok_engine.loading.resolve import read_config
from grok_engine.models.families import PRESETS, preset
from grok_engine.models.families.grok import ffn_width

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
SPARSE: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "d_ff": 48,
}
DENSE = {**{k: v for k, v in SPARSE.items() if "expert" not in k and k != "d_ff"}, "dense_d_ff": 48}
REQUIRED = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def reference_values() -> dict[str, Any]:
    """A fresh copy of a configuration in the key names of xAI's reference code."""
    values: dict[str, Any] = json.loads((GOLDENS / "g1-b-q48-k128" / "config.json").read_text())
    return values


def from_json(folder: Path, values: Any) -> ModelConfig:
    """What a user's config.json becomes; a string is written as it is."""
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return read_config(folder)


# Presets

# layers, D, H, G, C, experts, active, F, dense F, vocabulary, billions of parameters, and of those used by a token
PUBLISHED = {
    "grok-1": (64, 6144, 48, 8, 128, 8, 2, 32768, 0, 131072, 315.7, 83.8),
    "grok-2": (64, 8192, 64, 8, 128, 8, 2, 16384, 32768, 131072, 269.5, 115.0),
    "mixtral-8x7b": (32, 4096, 32, 8, 128, 8, 2, 14336, 0, 32000, 46.7, 12.9),
    "mixtral-8x22b": (56, 6144, 48, 8, 128, 8, 2, 16384, 0, 32000, 140.6, 39.1),
    "mistral-7b": (32, 4096, 32, 8, 128, 0, 0, 0, 14336, 32000, 7.24, 7.24),
    "grok-0": (64, 6144, 48, 8, 128, 0, 0, 0, 22528, 131072, 33.0, 33.0),
}
# Every difference between the families that is not a size
SWITCHES: dict[str, dict[str, Any]] = {
    "grok-1": {
        "activation": "gelu_tanh", "post_norms": True, "attn_softcap": 30.0, "router_softcap": 0.0,
        "final_softcap": 0.0, "renormalize": False, "embedding_multiplier": 78.38367176906169,
        "output_multiplier": 0.5773502691896257, "rope_theta": 1e4, "attn_temperature_len": 0, "sliding_window": 0,
        "tie_embeddings": True, "max_position": 8192, "attn_scale": 0.08838834764831845, "eos_token_ids": (2,),
    },
    "grok-2": {
        "activation": "gelu", "post_norms": True, "attn_softcap": 30.0, "router_softcap": 30.0,
        "final_softcap": 50.0, "renormalize": False, "embedding_multiplier": 90.50966799187809,
        "output_multiplier": 0.5, "rope_theta": 208533496.0, "attn_temperature_len": 1024, "sliding_window": 0,
        "tie_embeddings": False, "max_position": 131072,
    },
    "mixtral-8x7b": {
        "activation": "silu", "post_norms": False, "attn_softcap": 0.0, "router_softcap": 0.0, "final_softcap": 0.0,
        "renormalize": True, "embedding_multiplier": 1.0, "output_multiplier": 1.0, "rope_theta": 1e6,
        "attn_temperature_len": 0, "sliding_window": 0, "tie_embeddings": False,
    },
    "mistral-7b": {
        "activation": "silu", "post_norms": False, "attn_softcap": 0.0, "renormalize": False, "rope_theta": 1e4,
        "sliding_window": 4096, "tie_embeddings": False,
    },
    "grok-0": {
        "activation": "gelu_tanh", "post_norms": True, "attn_softcap": 30.0, "tie_embeddings": True,
        "embedding_multiplier": 78.38367176906169, "output_multiplier": 0.5773502691896257,
    },
}  # fmt: skip
SWITCHES["mixtral-8x22b"] = SWITCHES["mixtral-8x7b"]


def test_every_preset_is_checked_here() -> None:
    assert set(PRESETS) == set(PUBLISHED) == set(SWITCHES)
    assert all(config.name == name for name, config in PRESETS.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset(name: str) -> None:
    c = preset(name)
    *sizes, total, active = PUBLISHED[name]
    assert [
        c.num_layers, c.d_model, c.num_heads, c.num_kv_heads, c.head_dim,
        c.num_experts, c.num_experts_per_tok, c.d_ff, c.dense_d_ff, c.vocab_size,
    ] == sizes  # fmt: skip
    assert {key: getattr(c, key) for key in SWITCHES[name]} == SWITCHES[name]
    assert c.attn_scale == c.head_dim**-0.5
    assert c.norm_eps == 1e-5
    assert c.param_count() / 1e9 == pytest.approx(total, rel=0.003)
    assert c.active_param_count() / 1e9 == pytest.approx(active, rel=0.003)


def test_multipliers_are_roots_of_the_width() -> None:
    assert PRESETS["grok-1"].embedding_multiplier == pytest.approx(math.sqrt(6144), rel=1e-15)
    assert PRESETS["grok-2"].embedding_multiplier == pytest.approx(math.sqrt(8192), rel=1e-15)
    assert PRESETS["grok-1"].output_multiplier == pytest.approx(1 / math.sqrt(3), rel=1e-15)


def test_parameters_counted_by_hand() -> None:
    layer = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + 4 * 32 + 32 * 4 + 4 * 3 * 32 * 48
    assert ModelConfig(**SPARSE).param_count() == 2 * layer + 64 * 32 + 32
    assert ModelConfig(**SPARSE, tie_embeddings=False).param_count() == 2 * layer + 2 * 64 * 32 + 32
    assert ModelConfig(**SPARSE, post_norms=False).param_count() == 2 * (layer - 2 * 32) + 64 * 32 + 32
    assert ModelConfig(**SPARSE).active_param_count() == 2 * (layer - 2 * 3 * 32 * 48) + 64 * 32 + 32
    both = ModelConfig(**SPARSE, dense_d_ff=40)
    assert both.param_count() == 2 * (layer + 3 * 32 * 40) + 64 * 32 + 32
    dense = ModelConfig(**DENSE)
    assert dense.param_count() == dense.active_param_count()


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'grok-9': expected one of grok-1, .*mixtral-8x7b"):
        preset("grok-9")


@pytest.mark.parametrize(
    ("factor", "width", "expected"),
    [(8, 6144, 32768), (8, 128, 688), (8, 64, 344), (8, 32, 176), (4, 6144, 16384), (2.5, 100, 168), (1, 12, 8)],
)
def test_ffn_width(factor: float, width: int, expected: int) -> None:
    assert ffn_width(factor, width) == expected


# The dataclass


def test_frozen_and_keyword_only() -> None:
    config = ModelConfig(**SPARSE)
    with pytest.raises(FrozenInstanceError):
        config.num_layers = 3  # type: ignore[misc]
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        config.nonsense = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="positional"):
        ModelConfig(64, 32, 2, 4, 2, 8)  # type: ignore[misc]
    engine = EngineConfig(model=config)
    with pytest.raises(FrozenInstanceError):
        engine.page_size = 3  # type: ignore[misc]
    assert hash(config) == hash(ModelConfig(**SPARSE))


def test_what_is_resolved() -> None:
    assert ModelConfig(**SPARSE).attn_scale == 8**-0.5
    assert ModelConfig(**SPARSE, attn_scale=0.3).attn_scale == 0.3
    assert ModelConfig(**SPARSE).qkv_dim == (4 + 2 * 2) * 8
    assert EngineConfig(model=ModelConfig(**SPARSE, max_position=77)).max_model_len == 77
    assert EngineConfig(model=ModelConfig(**SPARSE), max_model_len=5).max_model_len == 5


@pytest.mark.parametrize("config", [*PRESETS.values(), ModelConfig(**SPARSE, eos_token_ids=(3, 4), bos_token_id=None)])
def test_dict_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    values = config.to_dict()
    assert set(values) == {f.name for f in fields(ModelConfig)}
    assert ModelConfig.from_dict(values) == config
    assert from_json(tmp_path, values) == config  # and through JSON, where a tuple is a list


@pytest.mark.parametrize("missing", REQUIRED)
def test_missing_key(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"missing key '{missing}'"):
        ModelConfig.from_dict({k: v for k, v in SPARSE.items() if k != missing})


def test_unknown_and_missing_keys_in_one_error() -> None:
    values = {**SPARSE, "n_layer": 2, "dropout": 0.1}
    del values["num_layers"]
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(values)
    for part in ("unknown key 'dropout', 'n_layer'", "missing key 'num_layers'", "known keys: ", "sliding_window"):
        assert part in str(caught.value)


IMPOSSIBLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *((SPARSE, {key: 0}, f"{key}=0 ") for key in (*REQUIRED, "max_position")),
    *((SPARSE, {key: -4}, f"{key}=-4 ") for key in (*REQUIRED, "num_experts", "d_ff", "sliding_window")),
    (SPARSE, {"num_kv_heads": 3}, "num_heads=4 .* num_kv_heads=3"),
    (SPARSE, {"head_dim": 7}, "head_dim=7 "),
    (SPARSE, {"activation": "relu"}, "activation='relu'.*" + ", ".join(ACTIVATIONS)),
    (SPARSE, {"num_experts_per_tok": 0}, "num_experts_per_tok=0 .*num_experts=4"),
    (SPARSE, {"num_experts_per_tok": 5}, "num_experts_per_tok=5 .*num_experts=4"),
    (SPARSE, {"d_ff": 0}, "d_ff=0 with num_experts=4"),
    (SPARSE, {"num_experts": 0}, "num_experts=0 .*num_experts_per_tok=2, d_ff=48"),
    (DENSE, {"dense_d_ff": 0}, "dense_d_ff=0"),
    (DENSE, {"router_softcap": 30.0}, "num_experts=0 .*router_softcap=30.0"),
    (DENSE, {"renormalize": True}, "num_experts=0 .*renormalize=True"),
    (SPARSE, {"attn_softcap": -1.0}, r"attn_softcap=-1\.0"),
    (SPARSE, {"router_softcap": math.inf}, "router_softcap=inf"),
    (SPARSE, {"final_softcap": math.nan}, "final_softcap=nan"),
    (SPARSE, {"embedding_multiplier": 0.0}, r"embedding_multiplier=0\.0"),
    (SPARSE, {"output_multiplier": math.inf}, "output_multiplier=inf"),
    (SPARSE, {"attn_scale": -0.5}, r"attn_scale=-0\.5"),
    (SPARSE, {"rope_theta": 0.0}, r"rope_theta=0\.0"),
    (SPARSE, {"norm_eps": 0.0}, r"norm_eps=0\.0"),
    (SPARSE, {"attn_temperature_len": 1}, "attn_temperature_len=1 "),
    (SPARSE, {"eos_token_ids": (2, 64)}, r"token 64 is not in 0\.\.63"),
    (SPARSE, {"bos_token_id": -1}, "token -1 "),
]


@pytest.mark.parametrize(("base", "change", "message"), IMPOSSIBLE, ids=[str(case[1]) for case in IMPOSSIBLE])
def test_impossible(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    ModelConfig(**base)
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**base, **change})
    with pytest.raises(ConfigError, match=message):
        replace(ModelConfig(**base), **change)


def test_all_problems_in_one_error() -> None:
    with pytest.raises(ConfigError, match=r"model 'mine': .*num_kv_heads=3.*; head_dim=7.*; activation='tanh'"):
        ModelConfig(**{**SPARSE, "name": "mine", "num_kv_heads": 3, "head_dim": 7, "activation": "tanh"})


INTEGERS = (
    *REQUIRED, "num_experts", "num_experts_per_tok", "d_ff", "dense_d_ff", "attn_temperature_len", "sliding_window",
    "max_position",
)  # fmt: skip
NUMBERS = (
    "attn_softcap", "router_softcap", "final_softcap", "embedding_multiplier", "output_multiplier", "attn_scale",
    "rope_theta", "norm_eps",
)  # fmt: skip
WRONG_TYPES: list[tuple[str, Any]] = [
    *((key, value) for key in INTEGERS for value in ("8", 2.5, None, True, [4])),
    *((key, value) for key in NUMBERS for value in ("0.5", None, True, [0.5], {})),
    *((key, value) for key in ("post_norms", "renormalize", "tie_embeddings") for value in ("false", 0, None)),
    *(("activation", value) for value in (None, 3, ["silu"])),
    *(("bos_token_id", value) for value in ("1", 1.5, [1], True)),
    *(("eos_token_ids", value) for value in (2, None, "2", ["2"], [2.5], [None], [[2]], [True])),
    *(("name", value) for value in (None, 3)),
]


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES, ids=[f"{k}={v!r}" for k, v in WRONG_TYPES])
def test_wrong_type(key: str, value: Any, tmp_path: Path) -> None:
    """From the file, from a dict and from code, a wrong type is a ConfigError that shows key and value."""
    values = {**SPARSE, key: value}
    for build in (lambda: from_json(tmp_path, values), lambda: ModelConfig.from_dict(values)):
        with pytest.raises(ConfigError) as caught:
            build()
        assert key in str(caught.value)
        assert repr(value[0] if isinstance(value, list) and key == "eos_token_ids" else value) in str(caught.value)
    with pytest.raises(ConfigError, match=key):
        ModelConfig(**values)


HOSTILE: tuple[Any, ...] = (
    10**400, -(10**400), 10**5000, 2**63, -1, 0, 1.5, 1e308, 5e-324, math.nan, math.inf, -math.inf, True, None, "1",
    b"x", [], {}, [10**400], (10**400,), (10**5000,), (math.nan,), (True,), ["a"],
)  # fmt: skip


@pytest.mark.parametrize("key", [f.name for f in fields(ModelConfig)])
def test_no_value_does_anything_but_fit_or_be_refused(key: str) -> None:
    def outcome(build: Callable[[], ModelConfig]) -> ModelConfig | str:
        try:
            return build()
        except ConfigError as error:
            return str(error)

    for value in HOSTILE:
        values = SPARSE | {key: value}
        for found in (outcome(lambda v=values: ModelConfig(**v)), outcome(lambda v=values: ModelConfig.from_dict(v))):
            if isinstance(found, str):
                assert key in found
                assert len(found) < 1000
            else:
                assert 0 < found.active_param_count() <= found.param_count()
                assert ModelConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found


# config.json


def test_no_config_is_grok_1(tmp_path: Path) -> None:
    assert read_config(tmp_path) == PRESETS["grok-1"]
    assert read_config(str(tmp_path)) == PRESETS["grok-1"]


def test_reference_keys() -> None:
    c = read_config(GOLDENS / "g1-b-q48-k128")
    assert c == replace(
        PRESETS["grok-1"], name="g1-b-q48-k128", vocab_size=2048, d_model=64, num_layers=1, d_ff=344, max_position=128
    )
    assert read_config(GOLDENS / "g8-a-emb128-k16").attn_scale == 0.25


def test_reference_with_one_expert_is_dense(tmp_path: Path) -> None:
    values = reference_values()
    values["model"].update(num_experts=1, num_selected_experts=1)
    c = from_json(tmp_path, values)
    assert (c.num_experts, c.num_experts_per_tok, c.d_ff, c.dense_d_ff) == (0, 0, 0, 344)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"vocab_size": 12', "not valid JSON"),
        ("[1, 2]", "holds a list, expected an object"),
        ("null", "holds a NoneType, expected an object"),
        ("{}", "missing key .*'vocab_size'"),
        ('{"model": 7}', "missing key"),
        ('{"vocab_size": NaN}', "NaN is not a number of JSON"),
        ('{"rope_theta": 1e999}', "1e999 is beyond a double"),
        (f'{{"num_layers": {10**400}}}', "is beyond 64 bits"),
        ('{"vocab_size": 2, "vocab_size": 3}', "key 'vocab_size' stands twice"),
        ("[" * 100_000, "too deeply nested"),
        ('{"name": "' + "x" * (1 << 24), "expected at most 8,388,608 bytes"),
    ],
)
def test_bad_json(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_json(tmp_path, text)
    assert "config.json" in str(caught.value) or "configuration" in str(caught.value)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"name": "\xff\xfe"}')
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_config(tmp_path)


OUTER = (
    "vocab_size", "eos_token", "sequence_len", "output_multiplier_scale", "embedding_multiplier_scale",
)  # fmt: skip
INNER = (
    "emb_size", "widening_factor", "key_size", "num_q_heads", "num_kv_heads", "num_layers", "attn_output_multiplier",
    "num_experts", "num_selected_experts",
)  # fmt: skip


@pytest.mark.parametrize("key", [*OUTER, *INNER])
def test_reference_key_missing(key: str, tmp_path: Path) -> None:
    values = reference_values()
    del (values if key in OUTER else values["model"])[key]
    with pytest.raises(ConfigError, match=f"missing key '{key}'"):
        from_json(tmp_path, values)


@pytest.mark.parametrize("where", ["outer", "inner"])
def test_reference_key_unknown(where: str, tmp_path: Path) -> None:
    values = reference_values()
    (values if where == "outer" else values["model"])["rope_teta"] = 1e4
    with pytest.raises(ConfigError, match="unknown key 'rope_teta'"):
        from_json(tmp_path, values)


def test_reference_values_that_contradict(tmp_path: Path) -> None:
    values = reference_values()
    values["model"]["vocab_size"] = 99
    with pytest.raises(ConfigError, match=r"model\.vocab_size=99 .*vocab_size=2048"):
        from_json(tmp_path, values)


WRONG = ("x", None, [4], {}, True, -1, 0, 2.5)
MULTIPLIERS = ("output_multiplier_scale", "embedding_multiplier_scale", "attn_output_multiplier", "widening_factor")
FINE = {*((key, "2.5") for key in MULTIPLIERS), ("eos_token", "0"), ("num_experts", "0")}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in (*OUTER, *INNER) for value in WRONG if (key, repr(value)) not in FINE],
)
def test_reference_value_of_a_wrong_type(key: str, value: Any, tmp_path: Path) -> None:
    """Always a ConfigError that names the file, and never another exception."""
    values = reference_values()
    (values if key in OUTER else values["model"])[key] = value
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        from_json(tmp_path, values)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, "x", []])
def test_reference_model_is_not_an_object(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model="):
        from_json(tmp_path, {**reference_values(), "model": value})


# EngineConfig

ENGINE_MODEL = ModelConfig(**SPARSE, max_position=77)
NO_REPR = 10**5000
NOT_COUNTS: list[Any] = [0, -1, "16", b"16", 2.0, math.nan, True, np.True_, [16], 2**70, NO_REPR]
NOT_BOOLS: list[Any] = [1, 0, "no", "", None, [True]]
# For each field: values that are refused, and values that are accepted, each with what it becomes.
ODD: dict[str, tuple[list[Any], list[tuple[Any, Any]]]] = {
    "dtype": (["float16", None, 5, b"float32", ["float32"], np.zeros(2)], [(np.str_("float32"), "float32")]),
    "device": ([None, 0, b"cpu"], [("cuda:1", "cuda:1")]),
    "weights": (["int3", 8, "", True], [(None, None), ("fp8", "fp8")]),
    "head": (["int3", 8, "", True], [(None, None), ("int8", "int8")]),
    "activations": (["bf16", 8, False], [(None, None), ("int8", "int8")]),
    "mmap": (NOT_BOOLS, [(np.True_, True)]),
    "kv_dtype": (["fp8", 16], [(None, "bfloat16"), ("fp8_e4m3", "fp8_e4m3")]),
    "max_model_len": ([*NOT_COUNTS, 78], [(None, 77), (np.int32(5), 5)]),
    "max_num_seqs": (NOT_COUNTS, [(np.uint8(5), 5)]),
    "max_num_batched_tokens": (NOT_COUNTS, [(np.int64(2**20), 2**20)]),
    "page_size": ([*NOT_COUNTS, None, 2**40], [(np.int64(4), 4)]),
    "num_pages": ([*NOT_COUNTS, 2**40], [(None, None), (np.int64(4), 4)]),
    "kv_memory": (NOT_COUNTS, [(None, None), (2**40, 2**40)]),
    "enable_prefix_caching": (NOT_BOOLS, [(np.False_, False)]),
    "enforce_eager": (NOT_BOOLS, [(np.True_, True)]),
    "seed": ([-1, 2**63, 0.0, "0", True, math.nan], [(None, None), (0, 0), (np.uint64(2**63 - 1), 2**63 - 1)]),
    "generation_config": (["file", None, True], [("vllm", "vllm")]),
    "max_n": ([*NOT_COUNTS, None], [(1, 1)]),
    "max_logprobs": ([-2, None, 5.0, True, 2**70], [(-1, -1), (0, 0)]),
    "max_stop_bytes": ([-1, None, 5.0, True, 2**70], [(0, 0)]),
    "max_grammar_bytes": ([-1, None, 5.0, True, 2**70], [(0, 0)]),
    "max_grammar_depth": ([*NOT_COUNTS, None], [(9, 9)]),
    "max_grammar_rules": ([*NOT_COUNTS, None], [(9, 9)]),
    "grammar_seconds": (
        [0, -1, math.nan, math.inf, None, "5", True, NO_REPR, 1e9], [(1, 1.0), (np.float32(0.5), 0.5)],
    ),
    "max_waiting": ([*NOT_COUNTS, None], [(9, 9)]),
    "expert_load": (NOT_BOOLS, [(np.True_, True)]),
}  # fmt: skip


def test_options_are_the_fields() -> None:
    annotations = {f.name: f.type for f in fields(EngineConfig) if f.name != "model"}
    options = {name: hint.__forward_arg__ for name, hint in EngineOptions.__annotations__.items()}
    assert options == annotations
    assert set(ODD) == set(annotations)
    assert EngineOptions.__optional_keys__ == set(annotations)


@pytest.mark.parametrize("name", ODD)
def test_odd_values_of_an_option(name: str) -> None:
    wrong, right = ODD[name]
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            EngineConfig(model=ENGINE_MODEL, **{name: value})
        assert str(caught.value).startswith(f"{name}=")
        assert " is not " in str(caught.value)
        assert len(str(caught.value)) < 400
        if value is not NO_REPR:
            assert repr(value) in str(caught.value)
    for value, becomes in right:
        found = getattr(EngineConfig(model=ENGINE_MODEL, **{name: value}), name)
        assert (found, type(found)) == (becomes, type(becomes)) or isinstance(value, np.str_)


def test_options_as_torch_has_them() -> None:
    options = {"dtype": torch.float32, "kv_dtype": torch.bfloat16, "device": torch.device("cpu")}
    c = EngineConfig.of(ENGINE_MODEL, options)
    assert (c.dtype, c.kv_dtype, c.device) == ("float32", "bfloat16", "cpu")
    with pytest.raises(ConfigError, match="dtype='float16' is not one of bfloat16, float32"):
        EngineConfig.of(ENGINE_MODEL, {"dtype": torch.float16})
    with pytest.raises(ConfigError, match="unknown option 'dtyp', perhaps dtype: expected one of dtype, "):
        EngineConfig.of(ENGINE_MODEL, {"dtyp": "float32"})
    with pytest.raises(ConfigError, match=r"unknown option 'gpu_memory_utilization', perhaps kv_memory \(bytes\): "):
        EngineConfig.of(ENGINE_MODEL, {"gpu_memory_utilization": 0.9})
    with pytest.raises(ConfigError, match="unknown option 'zzz': expected one of dtype, "):
        EngineConfig.of(ENGINE_MODEL, {"zzz": 1})
    with pytest.raises(ConfigError, match="model='tiny' is not a ModelConfig"):
        EngineConfig(model="tiny")  # type: ignore[arg-type]


def test_an_exception_as_messages_show_it() -> None:
    class Faulty(Exception):
        def __str__(self) -> str:
            raise self

    errors = [(KeyError("x"), "KeyError: 'x'"), (KeyboardInterrupt(), "KeyboardInterrupt"), (Faulty(), "Faulty")]
    for error, text in errors:
        assert described(error) == text


def test_a_step_has_a_token_for_each_sequence() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=7 is less than max_num_seqs=8"):
        EngineConfig(model=PRESETS["grok-1"], max_num_batched_tokens=7, max_num_seqs=8)
    EngineConfig(model=PRESETS["grok-1"], max_num_batched_tokens=8, max_num_seqs=8)


def test_pages_are_sized_in_one_way() -> None:
    with pytest.raises(ConfigError, match="num_pages=5 and kv_memory=9: expected one of them"):
        EngineConfig(model=PRESETS["grok-1"], num_pages=5, kv_memory=9)


def test_slots_have_32_bits() -> None:
    with pytest.raises(ConfigError, match="num_pages=134217728 of page_size=16 hold more than 2147483647 tokens"):
        EngineConfig(model=PRESETS["grok-1"], num_pages=2**27)
    EngineConfig(model=PRESETS["grok-1"], num_pages=2**27 - 1)
