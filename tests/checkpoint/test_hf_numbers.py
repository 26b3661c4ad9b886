"""What transformers writes is computed as transformers computes it, for every family and every spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from grok_engine import LLM, CheckpointError, SamplingParams, read_config
from grok_engine.config import ModelConfig
from grok_engine.models.families import parse_config, preset
from tests.checkpoint.hf_models import (
    SMALL,
    TOKENS,
    build,
    config_of,
    configure,
    error,
    judge,
    save,
    save_sharded,
    tensors_of,
)  # fmt: skip

GOLDENS = Path(__file__).parents[1] / "data" / "hf"
BOUND = 2e-5
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-mha": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-yarn": ("Llama", {"head_dim": 16, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu", "num_key_value_heads": 1}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "mistral-nemo": ("Mistral", {"head_dim": 16, "sliding_window": None, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6}}),
    "mixtral": ("Mixtral", {}),
    "mixtral-window-top3": ("Mixtral", {
        "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 6, "hidden_act": "gelu_pytorch_tanh"}),
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model once, as transformers saves it in bf16, the llama in fp16 and the tied one in fp32."""
    root, dtypes = tmp_path_factory.mktemp("hf"), {"llama": torch.float16, "llama-tied-mha": torch.float32}
    for name, (kind, config) in MODELS.items():
        build(kind, **config).to(dtypes.get(name, torch.bfloat16)).save_pretrained(root / name)
    return {name: root / name for name in MODELS}


def agrees(folder: Path, source: Path | None = None) -> None:
    """Our logits and greedy tokens in `folder` are those of transformers in `source`."""
    theirs, greedy = judge(source or folder)
    llm = LLM(folder, dtype="float32", weights="fp32")
    assert error(llm.logits(TOKENS), theirs) <= BOUND
    (output,) = llm.generate([TOKENS], SamplingParams(temperature=0, max_tokens=len(greedy), ignore_eos=True))
    assert list(output.outputs[0].token_ids) == greedy


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens(name: str, models: dict[str, Path]) -> None:
    agrees(models[name])


@pytest.mark.parametrize("name", ["grok2-a", "llama-a", "mistral-a", "mixtral-a"])
def test_golden(name: str) -> None:
    golden = np.load(GOLDENS / name / "golden.npz")
    llm = LLM(GOLDENS / name, dtype="float32")
    tokens, greedy = golden["tokens"].tolist(), golden["greedy"].tolist()
    assert error(llm.logits(tokens), golden["logits"]) <= BOUND
    (output,) = llm.generate([tokens], SamplingParams(temperature=0, max_tokens=len(greedy), ignore_eos=True))
    assert list(output.outputs[0].token_ids) == greedy


# Ways to write the same model


def old_spelling(values: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4.3x writes it: rope_theta at the top, torch_dtype, and no head_dim where it is D / H."""
    rope = dict(values["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    old = {key: value for key, value in values.items() if key not in ("rope_parameters", "dtype", "head_dim")}
    old |= {"rope_theta": theta, "torch_dtype": values["dtype"], "transformers_version": "4.38.0"}
    old["rope_scaling"] = None if kind == "default" else {"type" if kind == "linear" else "rope_type": kind, **rope}
    return old if values["head_dim"] in (None, 8) else {**old, "head_dim": values["head_dim"]}


@pytest.mark.parametrize("name", MODELS)
def test_both_spellings_are_one_architecture(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    old = old_spelling(config_of(models[name]))
    configure(tmp_path, old)
    new = read_config(models[name])
    assert read_config(tmp_path) == ModelConfig.from_dict({**new.to_dict(), "name": tmp_path.name})


PARTIAL: list[dict[str, Any]] = [
    {}, {"hidden_size": 2048}, {"num_key_value_heads": 16}, {"head_dim": None},
    {"head_dim": 64}, {"sliding_window": None}, {"sliding_window": 256}, {"rope_theta": 2e6},
    {"rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}}, {"rope_scaling": None}, {"eos_token_id": [2, 7]},
    {"eos_token_id": None, "bos_token_id": None}, {"tie_word_embeddings": True}, {"rms_norm_eps": 1e-4},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Mixtral"])
@pytest.mark.parametrize("values", PARTIAL, ids=str)
def test_absent_keys_have_the_defaults_of_transformers(kind: str, values: dict[str, Any]) -> None:
    import transformers

    theirs = getattr(transformers, f"{kind}Config")(**values)
    ours = parse_config({"architectures": [f"{kind}ForCausalLM"], **values}, "x")
    moe = kind == "Mixtral"
    eos = theirs.eos_token_id
    assert ours == ModelConfig(
        name="x",
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads,
        num_experts=theirs.num_local_experts if moe else 0,
        num_experts_per_tok=theirs.num_experts_per_tok if moe else 0,
        d_ff=theirs.intermediate_size if moe else 0,
        dense_d_ff=0 if moe else theirs.intermediate_size,
        activation="silu",
        post_norms=False,
        renormalize=moe,
        rope_theta=theirs.rope_parameters["rope_theta"],
        sliding_window=(None if kind == "Llama" else theirs.sliding_window) or 0,
        tie_embeddings=theirs.tie_word_embeddings,
        norm_eps=theirs.rms_norm_eps,
        max_position=theirs.max_position_embeddings,
        bos_token_id=theirs.bos_token_id,
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Mixtral"])
def test_null_key_value_heads_are_as_many_as_query_heads(kind: str) -> None:
    values = {"architectures": [f"{kind}ForCausalLM"], "num_attention_heads": 16, "num_key_value_heads": None}
    assert parse_config(values, "x").num_kv_heads == 16


def held(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in LLM(folder, dtype="float32", **options).model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].float(), b[name].float()), name


def test_stacked_experts_are_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    """As transformers 5 writes them if asked to keep its own layout."""
    source, tensors = models["mixtral"], tensors_of(models["mixtral"])
    block, stacked = "block_sparse_moe", {}
    for i in range(SMALL["num_hidden_layers"]):
        parts = {
            w: torch.stack([tensors.pop(f"model.layers.{i}.{block}.experts.{e}.{w}.weight") for e in range(8)])
            for w in ("w1", "w2", "w3")
        }
        stacked[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat([parts["w1"], parts["w3"]], 1)
        stacked[f"model.layers.{i}.mlp.experts.down_proj"] = parts["w2"]
        stacked[f"model.layers.{i}.mlp.gate.weight"] = tensors.pop(f"model.layers.{i}.{block}.gate.weight")
    folder = save(tmp_path / "stacked", {**tensors, **stacked}, config_of(source))
    same(held(folder), held(source))
    values = {**config_of(source), "num_experts": 8}
    del values["num_local_experts"]
    same(held(configure(folder, values)), held(source))


@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")])
def test_experts_one_by_one_under_the_names_of_transformers_5(
    names: tuple[str, ...], models: dict[str, Path], tmp_path: Path
) -> None:
    renamed = {}
    for name, tensor in tensors_of(models["mixtral"]).items():
        for w, new in zip(("w1", "w3", "w2"), names, strict=True):
            name = name.replace(f".{w}.", f".{new}.")
        renamed[name.replace("block_sparse_moe", "mlp")] = tensor
    same(held(save(tmp_path / "renamed", renamed, config_of(models["mixtral"]))), held(models["mixtral"]))


def test_shards_without_order_and_links_are_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    """Shards cut in the middle of a layer, then the hub cache's layout: links into a folder of blobs."""
    source, tensors = models["mixtral"], tensors_of(models["mixtral"])
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for i, name in enumerate(sorted(tensors, key=lambda name: crc32(name.encode()))):
        shards[i % 3][name] = tensors[name]
    folder = save_sharded(tmp_path / "shards", shards, config_of(source))
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{i:040d}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:040d}")
    same(held(snapshot), held(source))
    (snapshot / "model.safetensors.index.json").unlink()  # numbered files say themselves whether all are there
    same(held(snapshot), held(source))


def test_a_tied_model_with_its_matrix_twice_or_under_its_other_name(models: dict[str, Path], tmp_path: Path) -> None:
    source, tensors = models["llama-tied-mha"], tensors_of(models["llama-tied-mha"])
    embed, values = tensors["model.embed_tokens.weight"], config_of(source)
    assert "lm_head.weight" not in tensors
    same(held(save(tmp_path / "twice", {**tensors, "lm_head.weight": embed.clone()}, values)), held(source))
    del tensors["model.embed_tokens.weight"]
    same(held(save(tmp_path / "other", {**tensors, "lm_head.weight": embed}, values)), held(source))


def test_buffers_of_old_files_are_no_weights(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_of(models["llama"])
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    same(held(save(tmp_path / "old", tensors, config_of(models["llama"]))), held(models["llama"]))


def mistrals_own(tensors: dict[str, torch.Tensor], stacked: bool = False) -> dict[str, torch.Tensor]:
    """In Mistral's names; neighbouring rows of q and k are a pair for rotation there. stacked: the experts below one
    another, w2's transposed."""
    own: dict[str, torch.Tensor] = {}
    names = {
        "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn": "attention", "mlp": "feed_forward",
        "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3",
        "down_proj": "w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        parts = [names.get(part, part) for part in name.removeprefix("model.").split(".")]
        if "experts" in parts and stacked:
            layer, w = parts[1], parts[-2]
            stacks.setdefault(f"layers.{layer}.block_sparse_moe.{w}", []).append(tensor.T if w == "w2" else tensor)
            continue
        if "wq" in parts or "wk" in parts:
            half = len(tensor) // {"wq": 4, "wk": 2}[parts[-2]] // 2
            tensor = tensor.view(-1, 2, half, 32).transpose(1, 2).reshape(-1, 32)
        name = ".".join(parts)
        own[name if stacked else name.replace("block_sparse_moe", "feed_forward")] = tensor.contiguous()
    return own | {name: torch.cat(tensors) for name, tensors in stacks.items()}


PARAMS: dict[str, Any] = {
    "dim": 32, "n_layers": 2, "head_dim": 16, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6,
    "vocab_size": 96, "rope_theta": 1e6, "max_seq_len": 64,
}  # fmt: skip


def test_mistrals_own_files_are_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    """One file, numbered ones, and numbered ones with an index."""
    source = models["mistral-nemo"]
    own = mistrals_own(tensors_of(source))
    save_file(own, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    same(held(tmp_path), held(source))
    agrees(tmp_path, source)
    (tmp_path / "consolidated.safetensors").unlink()
    names = [f"consolidated-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(own.items())[i::2]) for i in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, tmp_path / name)
    same(held(tmp_path), held(source))
    weight_map = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    same(held(tmp_path), held(source))
    (tmp_path / names[0]).unlink()
    with pytest.raises(CheckpointError, match=rf"index.json names 1 file\(s\) that are not there: {names[0]}"):
        LLM(tmp_path)


@pytest.mark.parametrize("stacked", [False, True])
def test_mixtral_in_mistrals_own_files_is_the_same(stacked: bool, models: dict[str, Path], tmp_path: Path) -> None:
    """With experts one by one, or stacked as in the first release."""
    source, moe = models["mixtral"], {"num_experts": 8, "num_experts_per_tok": 2}
    params = {**PARAMS, "head_dim": 8, "norm_eps": 1e-5, "moe": moe, "use_biases": False}
    own = mistrals_own(tensors_of(source), stacked)
    save_file(own, tmp_path / "consolidated.00.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(params))
    same(held(tmp_path), held(source))
    agrees(tmp_path, source)
    save_file(own, tmp_path / "consolidated.01.safetensors")
    with pytest.raises(CheckpointError, match=r"consolidated.01.safetensors: pieces of every matrix, and no file says"):
        LLM(tmp_path)
    for wrong, message in (
        ({**moe, "num_shared_experts": 1}, "params.json: moe: unknown key 'num_shared_experts'"),
        ({"num_experts": 8}, "missing key 'num_experts_per_tok'"),
        ([8], r"moe=\[8\] is not an object"),
    ):
        (tmp_path / "params.json").write_text(json.dumps({**params, "moe": wrong}))
        with pytest.raises(CheckpointError, match=message):
            LLM(tmp_path)


def test_params_without_theta_are_those_of_v0_1_or_later() -> None:
    """v0.1's file has a window and no theta, and the code that reads it takes 1e4 then."""
    params = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
              "norm_eps": 1e-05, "vocab_size": 32000}  # fmt: skip
    assert parse_config({**params, "sliding_window": 4096}, "mistral-7b") == preset("mistral-7b")
    assert parse_config(params, "x").rope_theta == 1e6


# Grok-1, converted


def grok_1(style: str, norm: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Random tensors of a small Grok-1 in a style of names, and our names for them."""
    d, f, e, heads, kv, c = 32, 48, 4, 4, 2, 8
    shapes = {"q": (heads * c, d), "k": (kv * c, d), "v": (kv * c, d), "o": (d, heads * c)}
    names: dict[str, str] = {}
    for i in range(2):
        a, b = f"model.layers.{i}", f"transformer.decoder_layer.{i}"
        theirs = dict(zip("qkvo", ("query", "key", "value", "linear"), strict=True))
        for x in "qkvo":
            names[f"layers.{i}.attn.{x}"] = (
                f"{a}.attn.{x}_proj.weight" if style == "hpcai" else f"{b}.multi_head_attention.{theirs[x]}.weight"
            )
        for x, y in (("gate", "linear"), ("up", "linear_v"), ("down", "linear_1")):
            for k in range(e):
                names[f"layers.{i}.moe.{x}.{k}"] = (
                    f"{a}.moe_block.experts.{k}.{y}.weight" if style == "hpcai" else f"{b}.moe.{k}.{y}.weight"
                )
        names[f"layers.{i}.moe.router"] = f"{a}.moe_block.gate.weight" if style == "hpcai" else f"{b}.router.weight"
        for j, x in enumerate(("pre_attn", "post_attn", "pre_moe", "post_moe")):
            suffix = f"_{j}" if j else ""
            names[f"layers.{i}.norm.{x}"] = (
                f"{a}.{x}_norm.{norm}" if style == "hpcai" else f"{b}.rms_norm{suffix}.{norm}"
            )
    names["embed"] = "model.embed_tokens.weight" if style == "hpcai" else "transformer.in_out_embed.weight"
    names["final_norm"] = f"model.norm.{norm}" if style == "hpcai" else f"transformer.rms_norm.{norm}"
    rng = torch.Generator().manual_seed(1)
    tensors = {}
    for ours in sorted(names):  # the same numbers in every style
        *_, kind, last = ours.split(".") if "." in ours else ("", ours)
        shape: tuple[int, ...] = (64, d)
        if "norm" in ours:
            shape = (d,)
        elif ".attn." in ours:
            shape = shapes[last]
        elif ours.endswith("router"):
            shape = (e, d)
        elif ".moe." in ours:
            shape = (d, f) if kind == "down" else (f, d)
        tensors[names[ours]] = torch.randn(shape, generator=rng).to(torch.bfloat16)
    return tensors, names


GROK_1: dict[str, Any] = {
    "model_type": "grok-1", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "hidden_act": "gelu", "max_position_embeddings": 64, "attn_output_multiplier": 8**-0.5, "max_attn_value": 30.0,
}  # fmt: skip


@pytest.mark.parametrize(("style", "norm"), [("hpcai", "weight"), ("hpcai", "scale"), ("keyfan", "weight")])
def test_grok_1_converted(style: str, norm: str, tmp_path: Path) -> None:
    tensors, names = grok_1(style, norm)
    if style == "keyfan":
        tensors["lm_head.weight"] = tensors[names["embed"]].clone()
    llm = LLM(save(tmp_path / "grok", tensors, GROK_1), dtype="float32")
    model = dict(llm.model.named_parameters())
    w13 = torch.cat([tensors[names[f"layers.1.moe.{x}.3"]] for x in ("gate", "up")])
    assert torch.equal(model["layers.1.feed_forward.w13.values"][3], w13)
    assert torch.equal(model["layers.0.attn.o.values"][0], tensors[names["layers.0.attn.o"]])
    assert torch.equal(model["layers.1.post_attn.weight"], tensors[names["layers.1.norm.post_attn"]].float())
    assert torch.equal(model["layers.1.pre_moe.weight"], tensors[names["layers.1.norm.pre_moe"]].float())
    assert torch.equal(model["layers.0.feed_forward.router.weight"], tensors[names["layers.0.moe.router"]].float())
    assert torch.isfinite(llm.logits([1, 2, 3])).all()


def test_grok_1_has_its_constants_where_the_file_has_none() -> None:
    config = parse_config({**GROK_1, "architectures": ["Grok1ModelForCausalLM"]}, "x")
    assert (config.activation, config.renormalize, config.tie_embeddings, config.post_norms) == (
        "gelu_tanh", False, True, True,
    )  # fmt: skip
    assert config.embedding_multiplier == 78.38367176906169
    assert config.output_multiplier == 0.5773502691896257
    assert (config.attn_softcap, config.router_softcap, config.final_softcap) == (30.0, 0.0, 0.0)
    assert read_config(GOLDENS / "grok2-a").activation == "gelu"
