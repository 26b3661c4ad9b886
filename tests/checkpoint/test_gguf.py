"""GGUF files: the gguf package's values bit for bit, and transformers' logits on them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from grok_engine import LLM, SamplingParams
from grok_engine.checkpoint.base import CheckpointError
from grok_engine.checkpoint.gguf.blocks import OTHER_TYPES, TYPES, read_planes
from grok_engine.checkpoint.gguf.reader import GGUFCheckpoint
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.cli import main
from grok_engine.config import ModelConfig
from grok_engine.loading.convert import convert
from grok_engine.loading.fill import fill
from grok_engine.loading.random import random_checkpoint
from grok_engine.loading.resolve import read_config
from grok_engine.models.decoder import Decoder
from grok_engine.models.families import preset
from grok_engine.tools.inspect import inspect_checkpoint
from grok_kernels.formats import FORMATS, SUB
from grok_kernels.reference.quantize import dequantize_planes
from tests.checkpoint import gguf_models as models
from tests.checkpoint import hf_models
from tests.held import formats, held

GOLDENS = Path(__file__).parents[1] / "data" / "gguf"


# Types


def test_sizes_and_numbers_of_types_are_those_of_the_package() -> None:
    for number, kind in TYPES.items():
        assert (kind.name, (kind.columns, kind.nbytes)) == (Kind(number).name, gguf.GGML_QUANT_SIZES[Kind(number)])
    assert {kind.value: kind.name for kind in Kind if kind.value not in TYPES} == OTHER_TYPES


@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf")
@pytest.mark.parametrize("number", TYPES, ids=lambda number: TYPES[number].name)
def test_random_blocks_bit_for_bit(number: int) -> None:
    """Any bytes at all: infinite scales and NaN too, of which only the payload may differ."""
    kind = TYPES[number]
    raw = np.random.default_rng(number).integers(0, 256, (96, 768 // kind.columns * kind.nbytes), dtype=np.uint8)
    wanted = gguf.quants.dequantize(raw, Kind(number))
    planes = [torch.from_numpy(plane) for plane in read_planes(kind, raw)]
    named = dict(zip(FORMATS[kind.format].planes, (planes[0], *(plane.t() for plane in planes[1:])), strict=True))
    found = dequantize_planes(named).numpy()
    assert found.shape == (96, 768)
    assert ((found.view(np.uint32) == wanted.view(np.uint32)) | (np.isnan(found) & np.isnan(wanted))).all()
    if kind.split is not None:
        assert planes[1].shape == (96, 768 // kind.group)
        assert all(named[name].shape == (768 // kind.sub, 96) for name in SUB if name in named)


# Models


@pytest.mark.parametrize("name", ["llama-Q4_1", "mixtral-Q4_K_M"])
def test_goldens(name: str) -> None:
    golden = np.load(GOLDENS / f"{name}.npz")
    llm = LLM(GOLDENS / f"{name}.gguf", dtype="float32", num_pages=16)
    ids = golden["tokens"].tolist()
    logits = llm.logits(ids).numpy()
    assert np.linalg.norm(logits - golden["logits"]) <= 2e-5 * np.linalg.norm(golden["logits"])
    (output,) = llm.generate([ids], SamplingParams(max_tokens=len(golden["greedy"]), temperature=0, ignore_eos=True))
    assert list(output.outputs[0].token_ids) == golden["greedy"].tolist()
    llm.close()


def assert_holds(path: Path, wanted: Mapping[str, np.ndarray], **options: Any) -> Decoder:
    model = LLM(path, dtype="float32", num_pages=4, **options).model
    found = {name: values.numpy() for name, values in held(model)}
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, name)
    return model


@pytest.mark.parametrize("kind", [Kind(number) for number in TYPES], ids=lambda kind: kind.name)
def test_every_type_is_held_without_loss(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    wanted = models.meaning(models.write_model(path, kind, layers=1))
    assert_holds(path, wanted, weights="fp32")
    model = assert_holds(path, wanted)
    assert {format for path, format in formats(model).items() if path != "embed"} == {TYPES[kind.value].format}


@pytest.mark.parametrize("packed", [False, True])
def test_other_devices_get_8_bits_or_floats(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, from a file and from a converted folder, said once for each type."""
    path = tmp_path / "model.gguf"
    wanted = models.meaning(models.write_model(path, MIXED, models.EXPERTS))
    path = convert(path, tmp_path / "packed", dtype="float32") if packed else path
    model = Decoder(read_config(path), torch.float32)
    monkeypatch.setenv("GROK_KERNELS_BACKEND", "triton")
    with caplog.at_level(logging.INFO, "grok_engine"):
        fill(model, open_checkpoint(path, read_config(path)))
    for name, values in held(model):
        np.testing.assert_array_equal(values.numpy(), wanted[name], name)
    found = formats(model)
    assert set(found.values()) == {"int8", "fp32"}
    assert [found[f"layers.0.attn.qkv.{i}"] for i in (0, 1)] == ["fp32", "int8"]  # Q4_K; Q8_0 and Q6_K
    assert found["lm_head"] == "int8"
    assert len(caplog.messages) == len(set(caplog.messages))
    kind = "int4_k in panels" if packed else "Q4_K"
    assert f"2 matrices of {kind} are held in fp32, which loses nothing" in caplog.text


def test_q8_0_keeps_values_and_scales(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data, _ = models.write_model(path, Kind.Q8_0, layers=1)["blk.0.attn_output.weight"]
    blocks = data.reshape(models.D, -1, 34)
    for weights in (None, "int8"):
        weight = LLM(path, num_pages=4, weights=weights).model.layers[0].attn.o.weight
        assert weight.scales is not None
        assert torch.equal(
            weight.with_layout("rows").values[0].view(torch.uint8), torch.tensor(blocks[..., 2:]).flatten(1)
        )
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        assert torch.equal(weight.scales[0].T, torch.tensor(scales))


MIXED = {
    "attn_q": Kind.Q4_K, "attn_k": Kind.Q8_0, "attn_v": Kind.Q6_K, "attn_output": Kind.Q5_K, "ffn_gate": Kind.Q4_0,
    "ffn_up": Kind.Q5_0, "ffn_down": Kind.Q4_1, "ffn_gate_exps": Kind.Q8_0, "ffn_up_exps": Kind.Q6_K,
    "ffn_down_exps": Kind.Q5_1, "output": Kind.Q6_K, "token_embd": Kind.Q5_K,
}  # fmt: skip


@pytest.mark.parametrize("experts", [0, models.EXPERTS])
def test_types_mixed_in_one_weight(experts: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    wanted = models.meaning(models.write_model(path, MIXED, experts))
    assert read_config(path) == models.config(experts)
    found = formats(assert_holds(path, wanted))
    assert [found[f"layers.0.attn.qkv.{i}"] for i in range(3)] == ["int4_k", "int8", "int6_k"]
    assert found["layers.1.feed_forward.w13"] == ("fp32" if experts else "int5")  # Q8_0 and Q6_K; Q4_0 and Q5_0
    assert (found["embed"], found["lm_head"]) == ("int5_k", "int6_k")
    assert found["layers.1.feed_forward.w2"] == ("int5_min" if experts else "int4_min")
    for weights, bound in (("bf16", 4e-3), ("int8", 2e-2), ("fp8", 4e-2)):
        found = dict(held(LLM(path, num_pages=4, weights=weights).model))
        for name, values in wanted.items():
            assert np.linalg.norm(found[name].numpy() - values) <= bound * np.linalg.norm(values), (weights, name)


def test_parts_are_what_the_whole_has_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    models.write_model(path, MIXED, models.EXPERTS, layers=1)
    checkpoint = open_checkpoint(path, read_config(path))
    wholes = {name: checkpoint.read(name) for name in checkpoint.tensors}
    monkeypatch.setattr("grok_engine.checkpoint.gguf.reader.CHUNK", 20 * models.D)
    for name, info in checkpoint.tensors.items():
        assert wholes[name][0].shape == info.shape
        for again, plane in zip(checkpoint.read(name), wholes[name], strict=True):
            assert torch.equal(again, plane)
        if len(info.shape) == 1:
            continue
        rows, expert = slice(1, info.shape[-2] - 1), None if len(info.shape) == 2 else 2
        for part, plane in zip(checkpoint.read(name, expert=expert, rows=rows), wholes[name], strict=True):
            assert torch.equal(part, plane[rows] if expert is None else plane[expert, rows])
    with pytest.raises(CheckpointError, match="'nothing'"):
        checkpoint.read("nothing")


def write_stored(path: Path, tensors: Mapping[str, tuple[np.ndarray, Kind]], **options: Any) -> None:
    writer = models.Writer(path, **options)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.finish()


def test_a_tensor_for_each_expert(tmp_path: Path) -> None:
    """As older files have it; one expert of another type makes the tensor fp32."""
    path = tmp_path / "model.gguf"
    tensors = models.write_model(path, Kind.Q8_0, models.EXPERTS)
    wanted = models.meaning(tensors)
    single: dict[str, tuple[np.ndarray, Kind]] = {}
    for name, (data, kind) in tensors.items():
        if "_exps" in name:
            single |= {name.replace("_exps", f".{e}"): (data[e], kind) for e in range(models.EXPERTS)}
        else:
            single[name] = data, kind
    write_stored(path, single, experts=models.EXPERTS)
    assert_holds(path, wanted)
    values = models.dequantized(*single["blk.0.ffn_up.1.weight"])
    single["blk.0.ffn_up.1.weight"] = values, Kind.F32
    write_stored(path, single, experts=models.EXPERTS)
    model = assert_holds(path, wanted)
    assert model.layers[0].feed_forward.w13.weight.format == "fp32"
    del single["blk.1.ffn_down.2.weight"]
    write_stored(path, single, experts=models.EXPERTS)
    with pytest.raises(CheckpointError, match=r"missing tensors \['layers\.1\.moe\.down'\]"):
        LLM(path)


def test_a_tied_model(tmp_path: Path) -> None:
    """The embedding stays at its bits, and rows and products agree on what it means."""
    path = tmp_path / "model.gguf"
    wanted = models.meaning(models.write_model(path, Kind.Q5_1, tied=True, layers=1))
    assert read_config(path) == models.config(tied=True, num_layers=1)
    model = assert_holds(path, wanted)
    assert formats(model)["embed"] == "int5_min"
    ids = torch.tensor([5, 299, 5], dtype=torch.int32)
    rows = model.embed(ids, 1.0, torch.float32)
    assert torch.equal(rows, torch.tensor(wanted["embed"])[ids.long()])
    expected = rows.double() @ torch.tensor(wanted["embed"]).double().T
    assert torch.allclose(model.logits(rows).double(), expected, rtol=1e-5, atol=1e-5)


def test_llama_3s_frequency_factors_and_linear_scaling(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = models.write_model(path, Kind.F16, layers=1)
    factors = np.linspace(1, 8, models.C // 2, dtype=np.float32)
    write_stored(path, {**tensors, "rope_freqs.weight": (factors, Kind.F32)}, layers=1)
    assert read_config(path).rope_factors == tuple(factors.tolist())
    LLM(path, num_pages=4).close()
    writer = models.Writer(path, layers=1)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.finish()
    assert read_config(path).rope_factors == (4.0,) * (models.C // 2)


# Folders, split files, conversion


def test_split_files(tmp_path: Path) -> None:
    tensors = models.write_model(tmp_path / "whole.gguf", Kind.Q4_K)
    (tmp_path / "split").mkdir()
    first, _, last = models.split(tmp_path / "split", tensors)
    wanted = models.meaning(tensors)
    for path in (tmp_path / "split", first, last):
        assert read_config(path).num_layers == models.LAYERS
    assert_holds(first, wanted)
    first.rename(tmp_path / "first")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.gguf is missing"):
        LLM(last)


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"no": 1}, r"'no': 1, 'count': 3}, expected no 0 of count 3"),
        ({"count": 2}, r"'count': 2}, expected no 0 of count 3"),
        ({"total": 5}, r"split\.tensors\.count=5, found 21 tensors"),
    ],
)
def test_split_files_that_disagree(lies: dict[str, int], message: str, tmp_path: Path) -> None:
    tensors = models.write_model(tmp_path / "whole.gguf", Kind.Q4_K)
    (tmp_path / "split").mkdir()
    files = models.split(tmp_path / "split", tensors, lies)
    with pytest.raises(CheckpointError, match=message):
        read_config(files[0])


def test_a_folder_with_one_file_converts_and_one_with_two_is_refused(tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()
    models.write_model(folder / "model.gguf", Kind.Q8_0, models.EXPERTS)
    ids = [5, 17, 3, 90]
    logits = LLM(folder, num_pages=4).logits(ids)
    packed = convert(folder, tmp_path / "packed")
    assert torch.equal(LLM(packed, num_pages=4, mmap=True).logits(ids), logits)
    models.write_model(folder / "other.gguf", Kind.Q8_0)
    with pytest.raises(CheckpointError, match=r"several GGUF files, model\.gguf, other\.gguf"):
        LLM(folder)
    assert isinstance(open_checkpoint(folder / "model.gguf", read_config(folder / "model.gguf")), GGUFCheckpoint)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = models.write_model(path := tmp_path / "model.gguf", MIXED, models.EXPERTS)
    stored = sum(data.nbytes for data, _ in tensors.values())
    for verify in (False, True):
        report = inspect_checkpoint(path, verify=verify)
        assert (report.ok, report.files, report.total_bytes) == (True, None, stored)
        assert sum(report.bytes_by_kind.values()) == sum(report.bytes_by_dtype.values()) == stored
        found = {tensor.name: tensor for tensor in report.tensors}
        down, gate = found["layers.1.moe.down"], found["layers.0.moe.gate"]
        assert (down.dtype, down.shape, down.groups) == ("Q5_1", (models.EXPERTS, models.D, models.F), "16 × 32")
        assert (down.memory_bits, gate.memory_bits) == (6, 32)
        assert (gate.dtype, gate.groups, gate.scale_layout) == (
            "Q8_0",
            "8 × 32",
            "a scale for each row and 32 columns",
        )
        assert (gate.weight is None) is not verify
    values = models.dequantized(*tensors["blk.1.ffn_down_exps.weight"])
    assert down.weight is not None
    assert (down.weight.minimum, down.weight.maximum) == (values.min(), values.max())
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_by_dtype"]["Q8_0"] == report.bytes_by_dtype["Q8_0"]
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "top 2 of 4 experts of width 512 (silu) · context 64" in text
    assert "23 tensors" in text


# Grok


GROK_NAMES = {
    "embed": "token_embd", "final_norm": "output_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v",
    "attn.o": "attn_output", "moe.gate": "ffn_gate_exps", "moe.up": "ffn_up_exps", "moe.down": "ffn_down_exps",
    "moe.router": "ffn_gate_inp", "norm.pre_attn": "attn_norm", "norm.post_attn": "attn_output_norm",
    "norm.pre_moe": "ffn_norm", "norm.post_moe": "layer_output_norm", "lm_head": "output", "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up", "mlp.down": "ffn_down",
}  # fmt: skip


def grok_file(path: Path, c: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """A model of the grok architecture, all F32. tensors: by the engine's names."""
    writer = gguf.GGUFWriter(path, "grok")
    for add, value in (
        (writer.add_block_count, c.num_layers), (writer.add_context_length, c.max_position),
        (writer.add_embedding_length, c.d_model), (writer.add_feed_forward_length, c.dense_d_ff or c.d_ff),
        (writer.add_expert_feed_forward_length, c.d_ff), (writer.add_expert_count, c.num_experts),
        (writer.add_expert_used_count, c.num_experts_per_tok), (writer.add_head_count, c.num_heads),
        (writer.add_head_count_kv, c.num_kv_heads), (writer.add_key_length, c.head_dim),
        (writer.add_value_length, c.head_dim), (writer.add_layer_norm_rms_eps, c.norm_eps),
        (writer.add_rope_freq_base, c.rope_theta), (writer.add_vocab_size, c.vocab_size),
    ):  # fmt: skip
        add(value)
    writer.add_router_logit_softcapping(30.0)  # as llama.cpp's converter does for Grok-1 too, which has none
    if c.dense_d_ff:  # a file of Grok-2; the first ones of Grok-1 say none of these
        writer.add_attn_logit_softcapping(c.attn_softcap)
        writer.add_final_logit_softcapping(c.final_softcap)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_logit_scale(c.output_multiplier)
        writer.add_attn_output_scale(c.attn_scale)
        writer.add_attn_temperature_length(c.attn_temperature_len)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(16.0)
    for name, values in tensors.items():
        *layer, rest = name.removeprefix("layers.").split(".", 1) if name.startswith("layers.") else [name]
        writer.add_tensor(".".join([*(("blk", *layer) if layer else ()), GROK_NAMES[rest], "weight"]), values.numpy())
    models.Writer.finish(writer)  # type: ignore[arg-type]


@pytest.mark.parametrize("base", ["grok-1", "grok-2"])
def test_grok(base: str, tmp_path: Path) -> None:
    c = replace(
        preset(base), vocab_size=64, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, num_experts=4,
        d_ff=96, dense_d_ff=128 * (base == "grok-2"), attn_scale=128**-0.5, max_position=64,
    )  # fmt: skip
    model = Decoder(c, torch.float32)
    fill(model, random_checkpoint(model, "fp32"))
    wanted = {name: values.numpy() for name, values in held(model)}
    tensors = {name: torch.tensor(values) for name, values in wanted.items()}
    grok_file(path := tmp_path / f"{base}.gguf", c, tensors)
    found = read_config(path)
    near = {
        name: pytest.approx(value, rel=1e-7) if isinstance(value, float) else value
        for name, value in c.to_dict().items()
    }
    assert found.to_dict() == near | {"bos_token_id": None, "eos_token_ids": ()}
    assert found.router_softcap == (30 if c.dense_d_ff else 0)
    assert_holds(path, wanted)


def test_yarn_against_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    source = hf_models.build("Llama", rope_parameters=rope, max_position_embeddings=64)
    source.save_pretrained(folder := tmp_path / "hf")
    config, stored = source.config, hf_models.tensors_of(folder)
    writer = gguf.GGUFWriter(path := tmp_path / "model.gguf", "llama")
    for add, value in (
        (writer.add_block_count, config.num_hidden_layers), (writer.add_context_length, 64),
        (writer.add_embedding_length, config.hidden_size), (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, config.num_attention_heads), (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps), (writer.add_rope_freq_base, 1e4),
        (writer.add_rope_scaling_type, gguf.RopeScalingType.YARN), (writer.add_rope_scaling_factor, 4.0),
        (writer.add_rope_scaling_orig_ctx_len, 16), (writer.add_vocab_size, config.vocab_size),
    ):  # fmt: skip
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in stored.items():
        x = tensor.float().numpy()
        if count := heads.get(name.split(".")[-2]):  # as llama.cpp's converter orders rows
            x = x.reshape(count, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(x))
    models.Writer.finish(writer)  # type: ignore[arg-type]
    logits, _ = hf_models.judge(folder, greedy=0)
    assert hf_models.error(LLM(path, dtype="float32", num_pages=8).logits(hf_models.TOKENS), logits) <= 2e-5


def test_pieces_of_a_split_file_that_changed_places_or_are_there_twice(tmp_path: Path) -> None:
    tensors = models.write_model(tmp_path / "whole.gguf", Kind.Q4_K)
    for case, message in (("swapped", "model-00002-of-00003.gguf says split .*'no': 2"), ("repeated", "is in two")):
        (folder := tmp_path / case).mkdir()
        _, second, third = models.split(folder, tensors)
        data = second.read_bytes()
        second.write_bytes(third.read_bytes())
        if case == "swapped":
            third.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_config(folder)


def test_a_file_that_is_cut_between_header_and_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading its mapping beyond the end would kill the process."""
    models.write_model(path := tmp_path / "model.gguf", Kind.Q8_0, layers=1)
    config = read_config(path)
    monkeypatch.setattr("grok_engine.checkpoint.gguf.header.Header.is_current", lambda header: True)
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match="bytes as when opened, found"):
        open_checkpoint(path, config)
