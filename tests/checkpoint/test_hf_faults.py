"""Whatever is wrong with a folder is said, all of it in one error, and nothing is loaded wrongly in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grok_engine import LLM, CheckpointError
from grok_engine.checkpoint.hf.files import INDEX
from tests.checkpoint.hf_models import config_of, configure

DATA = Path(__file__).parents[1] / "data" / "hf"
MODEL = "model.safetensors"


def copy(name: str, target: Path) -> Path:
    shutil.copytree(DATA / name, target, ignore=shutil.ignore_patterns("golden.npz"))
    return target


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = MODEL) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / file)


def index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    values = json.loads((folder / INDEX).read_text())
    change(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


def drop_expert_3(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".experts.3." in name]:
        del tensors[name]


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        LLM(folder)
    return caught.value


Q = "model.layers.1.self_attn.q_proj.weight"

LLAMA: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = [
    ("missing", lambda t: t.pop(Q), rf"missing 1 tensor\(s\): {Q}"),
    ("extra", lambda t: t.update(odd=torch.ones(2)), r"1 tensor\(s\) without a place: odd"),
    ("bias", lambda t: t.update({Q.replace("weight", "bias"): torch.ones(96)}), "without a place: .*q_proj.bias"),
    ("mis-shaped", lambda t: t.update({Q: t[Q][:-1]}), rf"{Q} has shape \(95, 96\), expected \(96, 96\)"),
    ("transposed", lambda t: t.update({Q.replace(".q", ".k"): t[Q.replace(".q", ".k")].T}), r"\(96, 32\), expected"),
    ("double", lambda t: t.update({Q: t[Q].double()}), f"{Q} is F64, expected one of F32, BF16, F16"),
    ("integers", lambda t: t.update({Q: t[Q].long()}), f"{Q} is I64"),
    ("int8-without-scales", lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} is I8 .*no quantisation"),
    ("norm-as-matrix", lambda t: t.update({"model.norm.weight": torch.ones(1, 96)}), r"\(1, 96\), expected \(96,\)"),
    ("another-head", lambda t: t.update({"lm_head.weight": torch.ones(320, 96)}),
     "lm_head.weight differs from model.embed_tokens.weight, though tie_word_embeddings is true"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in LLAMA], ids=[case[0] for case in LLAMA])
def test_wrong_tensors(change: Callable[[dict[str, torch.Tensor]], Any], message: str, tmp_path: Path) -> None:
    folder = copy("llama-a", tmp_path / "model")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        LLM(folder)
    assert len(caught.value.problems) == 1


CONFIG: list[tuple[str, dict[str, Any], str]] = [
    ("architecture", {"architectures": ["Qwen3ForCausalLM"]},
     r"'Qwen3ForCausalLM'.* is not served: expected one of Grok1ForCausalLM, .*MixtralForCausalLM.*LlamaForCausalLM"),
    ("two-families", {"architectures": ["MistralForCausalLM"]}, "and model_type='llama' name two families"),
    ("model-type", {"architectures": None, "model_type": "gpt_neox"}, "'gpt_neox' is not served"),
    ("no-architecture", {"architectures": None, "model_type": None}, "unknown key|missing key"),
    ("layers", {"num_hidden_layers": 5}, r"missing 9 tensor\(s\): model.layers.4"),
    ("fewer-layers", {"num_hidden_layers": 3}, r"9 tensor\(s\) without a place: model.layers.3"),
    ("heads", {"num_attention_heads": 3, "num_key_value_heads": 1}, r"q_proj.weight has shape \(96, 96\), exp"),
    ("untied", {"tie_word_embeddings": False}, r"missing 1 tensor\(s\): lm_head.weight"),
    ("rope", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
     "rope_type='longrope' is not served, expected one of default, linear, dynamic, llama3, yarn"),
    ("rope-old", {"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2}}, "rope_type='su' is not"),
    ("rope-twice", {"rope_theta": 5e5}, r"rope_theta is 500000.0 in one place and 10000.0 in rope_parameters"),
    ("rope-factor", {"rope_parameters": {"rope_type": "linear"}}, "factor=None of the rotary embedding is not"),
    ("rope-partial", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not served"),
    ("activation", {"hidden_act": "relu2"}, "hidden_act='relu2' is not served, expected one of silu"),
    ("bias", {"attention_bias": True, "mlp_bias": True}, "attention_bias=True is not served.*mlp_bias=True"),
    ("typo", {"rope_thetta": 1e6}, "unknown key 'rope_thetta': expected 'rope_theta'"),
    ("text", {"hidden_size": "96"}, "hidden_size='96' is not an integer"),
    ("true", {"num_hidden_layers": True}, "num_hidden_layers=True is not an integer"),
    ("huge", {"num_hidden_layers": 10**12}, "num_layers=1000000000000 is not a positive integer up to 4096"),
    ("huge-context", {"max_position_embeddings": 10**12}, "max_position=1000000000000 is not a positive integer up to"),
    ("zero-heads", {"num_attention_heads": 0}, "num_heads=0 is not"),
    ("eos", {"eos_token_id": ["x"]}, r"eos_token_id=\['x'\] is not an integer"),
    ("layer-types", {"layer_types": ["full_attention", "sliding_attention"]}, "layers of several types"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in CONFIG], ids=[case[0] for case in CONFIG])
def test_wrong_configuration(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copy("llama-a", tmp_path / "model")
    configure(folder, {k: v for k, v in {**config_of(folder), **change}.items() if v is not None})
    with pytest.raises(CheckpointError, match=message):
        LLM(folder)


FIRST = "model-00001-of-00007.safetensors"
SECOND = "model-00002-of-00007.safetensors"
SHARDS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("file-missing", lambda f: (f / SECOND).unlink(), rf"names 1 file\(s\) that are not there: {SECOND}"),
    ("file-missing-without-index", lambda f: ((f / SECOND).unlink(), (f / INDEX).unlink()), f"missing {SECOND}"),
    ("file-truncated", lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-1]), f"{SECOND}: expected"),
    ("file-elsewhere", lambda f: index(f, lambda m: m.update({next(iter(m)): "../x.safetensors"})), "beside it"),
    ("tensor-moved", lambda f: index(f, lambda m: m.update({next(k for k in m if m[k] == FIRST): SECOND})),
     f"{INDEX} says that {SECOND} holds"),
    ("tensor-unnamed", lambda f: index(f, lambda m: m.pop(next(k for k in m if m[k] == FIRST))), "does not place"),
    ("tensor-twice", lambda f: edit(f, lambda t: t.update({"model.norm.weight": torch.ones(1)}), FIRST),
     f"{FIRST} holds model.norm.weight, which {INDEX} does not place there"),
    ("index-no-json", lambda f: (f / INDEX).write_text("{"), f"{INDEX} is not valid JSON"),
    ("index-empty", lambda f: (f / INDEX).write_text("{}"), "expected weight_map to map"),
    ("another-model", lambda f: save_file({"x": torch.ones(1)}, f / MODEL), f"{MODEL} lies beside {INDEX}"),
    ("experts", lambda f: configure(f, {**config_of(f), "num_local_experts": 4}),
     r"the files hold experts 0\.\.7, expected 4"),
    ("more-experts", lambda f: configure(f, {**config_of(f), "num_local_experts": 9}),
     r"the files hold experts 0\.\.7, expected 9"),
    ("expert-missing", lambda f: [edit(f, drop_expert_3, file.name) for file in f.glob("*.safetensors")],
     r"the files hold experts 0\.\.7 without 3, expected 8"),
    ("experts-twice", lambda f: configure(f, {**config_of(f), "num_experts": 9}), "=8 and num_experts=9"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in SHARDS], ids=[case[0] for case in SHARDS])
def test_wrong_shards(change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = copy("mixtral-a", tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        LLM(folder)


def ranked(number: str, rank: str) -> str:
    return f"pytorch_model-{number}-TP-{rank}.safetensors"


def drop_rank(folder: Path, rank: int) -> None:
    for file in folder.glob(f"*-TP-{rank:03d}.safetensors"):
        file.unlink()


GROK_2: list[tuple[str, Callable[[Path], Any], str]] = [
    ("one-file-missing", lambda f: (f / ranked("00003", "005")).unlink(), "a matrix of one shape in each of 8"),
    ("last-rank-missing", lambda f: drop_rank(f, 7), r"w1.weight has shape \(56, 64\), expected \(64, 64\)"),
    ("middle-rank-missing", lambda f: drop_rank(f, 3), "expected a matrix of one shape in each of 8 ranks"),
    ("all-but-one-missing", lambda f: [drop_rank(f, r) for r in range(1, 8)], r"w1.weight has shape \(8, 64\)"),
    ("repeated-as-another-rank", lambda f: shutil.copy(f / ranked("00003", "001"), f / ranked("00003", "004")),
     r"00003-TP-004\.safetensors and pytorch_model-00003-TP-001\.safetensors hold the same values of"),
    ("repeated", lambda f: shutil.copy(f / ranked("00003", "001"), f / ranked("00005", "001")), "expected it once"),
    ("repeated-as-common", lambda f: shutil.copy(f / ranked("00003", "001"), f / ranked("00005", "common")),
     "expected it once"),
    ("renumbered", lambda f: (f / ranked("00003", "007")).rename(f / ranked("00003", "008")), "in each of 9 ranks"),
    ("common-missing", lambda f: (f / ranked("00002", "common")).unlink(), r"missing 13 tensor"),
    ("axis", lambda f: edit(f, lambda t: t.update({k: v.T for k, v in t.items()}), ranked("00003", "002")),
     "expected a matrix of one shape"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in GROK_2], ids=[case[0] for case in GROK_2])
def test_wrong_ranks(change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = copy("grok2-a", tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        LLM(folder)


def test_everything_is_said_at_once(tmp_path: Path) -> None:
    folder = copy("llama-a", tmp_path / "model")
    edit(folder, lambda t: (t.pop(Q), t.update(odd=torch.ones(2), **{"model.norm.weight": torch.ones(5)})))
    configure(folder, {**config_of(folder), "quantization_config": {"quant_method": "hqq"}})
    problems = refused(folder).problems
    assert len(problems) == 4
    for word in ("gptq", "missing 1", "model.norm.weight has shape (5,)", "odd"):
        assert any(word in problem for problem in problems), word


def test_many_problems_are_cut_in_the_message_alone(tmp_path: Path) -> None:
    folder = copy("mixtral-a", tmp_path / "model")
    configure(folder, {**config_of(folder), "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1})
    error = refused(folder)
    assert len(error.problems) > 60
    assert len(str(error).splitlines()) == 42
    assert str(error).endswith(f"and {len(error.problems) - 40} more")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    folder = copy("llama-a", tmp_path / "model")
    (folder / MODEL).rename(folder / name)
    message = "not read. Take the model's safetensors files, or convert it .*save_pretrained"
    with pytest.raises(CheckpointError, match=f"found {name}: pickles can run any code and are {message}"):
        LLM(folder)


def test_a_folder_without_weights_or_without_configuration(tmp_path: Path) -> None:
    folder = copy("llama-a", tmp_path / "model")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds safetensors: expected a config\.json"):
        LLM(folder)
    (folder / MODEL).unlink()
    shutil.copy(DATA / "llama-a" / "config.json", folder)
    with pytest.raises(CheckpointError, match=f"expected {MODEL}, or files that {INDEX} names, found none"):
        LLM(folder)
    save_file({"lora_A": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"found adapter_model\.safetensors: expected"):
        LLM(folder)
