"""Folders of the hub that we write: judged by transformers, compressed-tensors and safetensors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from grok_engine import LLM, CheckpointError, read_config
from grok_engine.checkpoint.base import TensorInfo
from grok_engine.checkpoint.hf.compressed import quantization_config
from grok_engine.checkpoint.hf.values import hf_values
from grok_engine.checkpoint.hf.writer import hf_files
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.random import RandomCheckpoint
from grok_engine.checkpoint.shapes import tensor_shapes
from grok_engine.loading.convert import convert
from grok_engine.models.families import parse_config, preset
from tests.checkpoint.hf_models import config_of, configure, error, judge, save, tensors_of

DATA = Path(__file__).parents[1] / "data"
HF, GGUF, GROK = DATA / "hf", DATA / "gguf", DATA / "goldens" / "g8-a-emb128-k16"
IDS = [5, 9, 200, 3, 3, 17, 90, 41]


def logits(model: Path) -> torch.Tensor:
    llm = LLM(model, dtype="float32", num_pages=16)
    try:
        return llm.logits(IDS)
    finally:
        llm.close()


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """What a folder in compressed-tensors' formats means, by that package's own unpacking."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    stored, found = tensors_of(folder), {}
    for name, tensor in stored.items():
        stem = name.removesuffix("_packed")
        if stem != name:
            tensor = unpack_from_int32(tensor, 8, torch.Size(stored[f"{stem}_shape"].tolist()))
        if (scale := stored.get(f"{stem}_scale")) is not None:
            tensor = tensor.float() * scale.repeat_interleave(tensor.shape[1] // scale.shape[1], 1)
        if not name.endswith(("_scale", "_shape")):
            found[stem] = tensor.float()
    return found


def plain(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same model in fp32."""
    values = {key: value for key, value in config_of(folder).items() if key != "quantization_config"}
    return save(folder.with_name(f"{folder.name}-plain"), tensors, {**values, "torch_dtype": "float32"})


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["mixtral-a", "llama-a", "mistral-a"])
def test_transformers_reads_8_bits(name: str, weights: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder = convert(HF / name, tmp_path / "out", format="hf", weights=weights)
    QuantizationConfig.model_validate(config_of(folder)["quantization_config"])  # as vLLM does
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=CompressedTensorsConfig(dequantize=True),  # activations stay as they are
    )
    with torch.inference_mode():
        found = model(torch.tensor([IDS])).logits[0]
    meant = dequantized(folder)
    assert error(found, judge(plain(folder, meant), IDS, greedy=0)[0]) < 2e-6
    for key, exact in tensors_of(HF / name).items():
        x = exact.float()
        if "proj" not in key and "experts" not in key:
            assert torch.allclose(meant[key], x, rtol=2**-8), key  # rounded to bf16 at most
        elif weights == "int8":  # by half a step
            assert ((meant[key] - x).abs() <= 0.501 * x.abs().amax(1, keepdim=True) / 127).all(), key
        else:  # of 4 bits, and subnormal ones far below the largest
            assert ((meant[key] - x).abs() <= x.abs() / 16 + x.abs().amax(1, keepdim=True) / 2**18).all(), key


@pytest.mark.parametrize("name", ["mixtral-a", "llama-a", "mistral-a"])
def test_floats_stay_bit_for_bit_and_files_come_with_them(name: str, tmp_path: Path) -> None:
    shutil.copytree(HF / name, tmp_path / "model")
    for more in ("chat_template.jinja", "special_tokens_map.json", "generation_config.json"):
        (tmp_path / "model" / more).write_text('{"temperature": 0.6}')
    folder = convert(tmp_path / "model", tmp_path / "out", format="hf")
    before, after = tensors_of(HF / name), tensors_of(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert config_of(folder).items() >= {k: v for k, v in config_of(HF / name).items() if k != "dtype"}.items()
    assert (folder / "chat_template.jinja").read_text() == '{"temperature": 0.6}'
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2], "temperature": 0.6}
    assert (folder / "special_tokens_map.json").is_file()
    assert np.array_equal(judge(HF / name, IDS, greedy=0)[0], judge(folder, IDS, greedy=0)[0])


def test_fp16_stays(tmp_path: Path) -> None:
    tensors = {key: tensor.half() for key, tensor in tensors_of(HF / "llama-a").items()}
    source = save(tmp_path / "half", tensors, config_of(HF / "llama-a"))
    folder = convert(source, tmp_path / "out", format="hf")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in tensors_of(folder).items())
    assert config_of(folder)["torch_dtype"] == "float16"
    assert torch.equal(logits(source), logits(folder))


@pytest.mark.parametrize("name", ["llama-Q4_1", "mixtral-Q4_K_M"])
def test_a_gguf_file_becomes_a_folder_that_transformers_reads(name: str, tmp_path: Path) -> None:
    folder = convert(GGUF / f"{name}.gguf", tmp_path / "out", format="hf", weights="fp32")
    golden = np.load(GGUF / f"{name}.npz")
    found, greedy = judge(folder, golden["tokens"].tolist(), len(golden["greedy"]))
    assert np.linalg.norm(found - golden["logits"]) <= 2e-5 * np.linalg.norm(golden["logits"])
    assert greedy == golden["greedy"].tolist()


def test_shards_have_an_index(tmp_path: Path) -> None:
    config = read_config(HF / "mixtral-a")
    checkpoint = open_checkpoint(HF / "mixtral-a", config)
    files, small = hf_files(checkpoint, config, config_of(HF / "mixtral-a"), None, shard_bytes=200_000)
    assert [file.name for file in files] == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert list(small) == ["model.safetensors.index.json", "config.json"]  # what makes it a model comes last
    for file in files:
        data = bytearray(file.nbytes)
        data[: len(file.head)] = file.head
        for start, part in file.body():
            data[start : start + len(part)] = part
        (tmp_path / file.name).write_bytes(data)
    for name, content in small.items():
        (tmp_path / name).write_bytes(content)
    assert np.array_equal(judge(tmp_path, IDS, greedy=0)[0], judge(HF / "mixtral-a", IDS, greedy=0)[0])
    total = sum(tensor.nbytes for tensor in tensors_of(tmp_path).values())
    assert json.loads(small["model.safetensors.index.json"])["metadata"] == {"total_size": total}


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    folder = convert(HF / "llama-a", tmp_path / "out", format="hf", weights="int8")
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    sizes = {"F32": 4, "BF16": 2, "I32": 4, "I64": 8}
    for name, place in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + place["data_offsets"][0]) % sizes[place["dtype"]] == 0, name
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# Grok


def test_grok_1_in_hpcai_techs_names_keeps_the_releases_values(tmp_path: Path) -> None:
    folder = convert(GROK, tmp_path / "out", format="hf")
    meant, checkpoint = dequantized(folder), open_checkpoint(GROK, read_config(GROK))
    values, scales = checkpoint.read("layers.1.moe.down", expert=3)
    group = values.shape[1] // scales.shape[1]
    exact = values.float() * scales.float().repeat_interleave(group, 1)
    assert torch.equal(meant["model.layers.1.moe_block.experts.3.linear_1.weight"], exact)
    assert torch.equal(meant["model.layers.0.moe_block.gate.weight"], checkpoint.read("layers.0.moe.router")[0])
    assert "model.layers.1.post_attn_norm.weight" in meant
    quantization = config_of(folder)["quantization_config"]
    schemes = {
        tuple(group["targets"]): group["weights"]["group_size"] for group in quantization["config_groups"].values()
    }
    assert schemes[("re:model\\.layers\\.\\d+\\.moe_block\\.experts\\.\\d+\\.linear_1$",)] == group
    found = read_config(folder)
    assert replace(found, name="") == replace(read_config(GROK), name="")


def test_grok_2_becomes_one_set_of_whole_tensors(tmp_path: Path) -> None:
    folder = convert(HF / "grok2-a", tmp_path / "out", format="hf")
    assert torch.equal(logits(folder), logits(HF / "grok2-a"))
    assert tensors_of(folder)["model.layers.0.block_sparse_moe.experts.1.w2.weight"].shape == (64, 64)


# What a file says


@pytest.mark.parametrize("name", ["grok-1", "grok-2", "mixtral-8x7b", "mixtral-8x22b", "mistral-7b"])
def test_a_configuration_comes_back(name: str) -> None:
    family, values = hf_values(preset(name), {})
    assert parse_config(values, name) == preset(name)
    assert values["architectures"][0] in family.architectures


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ],
)  # fmt: skip
def test_a_rotary_scaling_is_found_again(rope: dict[str, Any]) -> None:
    values = {**config_of(HF / "llama-a"), "rope_parameters": {"rope_theta": 5e5, **rope}}
    config = parse_config(values, "x")
    assert parse_config(hf_values(config, {})[1], "x") == config


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"activation": "gelu"}, ("activation='gelu' would be read as", "renormalize=True would")),
        ({"router_softcap": 5.0}, ("router_softcap=5.0 would be read as",)),
        ({"rope_factors": (1.0, 2.0) * 32}, ("rope_factors",)),
        ({"output_multiplier": 0.5, "renormalize": False}, ("output_multiplier=0.5 would", "renormalize=False would")),
    ],
)
def test_what_no_architecture_says_is_refused_by_name(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    base = preset("mixtral-8x7b")
    config = replace(base, post_norms="gelu" in changes.values(), **changes)
    with pytest.raises(CheckpointError) as caught:
        hf_values(config, {})
    assert all(name in str(caught.value) for name in names), str(caught.value)


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(convert(HF / "llama-a", tmp_path / "packed"), source)
    configure(source, {**config_of(source), "output_multiplier": 0.5})
    with pytest.raises(CheckpointError, match=r"output_multiplier=0\.5"):
        convert(source, tmp_path / "out", format="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "packed"]


# Large models


def test_the_releases_318_gb_take_memory_for_a_few_rows() -> None:
    """Planned for Grok-1 itself, with one part of each kind made."""
    config = preset("grok-1")
    infos = []
    for name, shape in tensor_shapes(config).items():
        quantised = len(shape) > 1 and name != "embed" and "router" not in name
        groups = 8 if name.endswith((".o", ".down")) else 1
        block = (1, shape[-1] // groups) if quantised else None
        infos.append(
            TensorInfo(
                name=name, shape=shape, format="int8" if quantised else "fp32", block=block, nbytes=1, stored="x"
            )
        )
    files, small = hf_files(RandomCheckpoint(infos), config, {}, None)
    assert 310e9 < sum(file.nbytes for file in files) < 330e9
    assert max(file.nbytes for file in files) < 5.1e9
    assert len(json.loads(small["model.safetensors.index.json"])["weight_map"]) > 3 * 64 * 24
    for file in files[:1]:
        sizes = [len(part) for (_, part), _ in zip(file.body(), range(3), strict=False)]
        assert max(sizes) <= 4 << 20


def test_one_scheme_for_all_is_every_linear_layer_but_those_in_floats() -> None:
    from grok_engine.checkpoint.hf.compressed import Scheme

    one = quantization_config({"a.{i}": {"a.0": Scheme("int8"), "a.1": Scheme("int8")}, "head": {"head": None}})
    assert one is not None
    assert [group["targets"] for group in one["config_groups"].values()] == [["Linear"]]
    assert one["ignore"] == ["head"]
    assert quantization_config({"head": {"head": None}}) is None
