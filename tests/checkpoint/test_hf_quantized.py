"""Quantised folders mean what their scales say, keep their values bit for bit, and any folder may be rounded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grok_engine import LLM, CheckpointError, read_config
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.layers.weight import FusedWeight
from grok_engine.models.decoder import Decoder
from tests.checkpoint.hf_models import TOKENS, build, config_of, error, judge, save, tensors_of
from tests.held import formats, held

CHANNEL = {"num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**CHANNEL, **weights}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


# How a checkpoint is quantised: its config, dtype, block (0 is all), and the name of the scales
KINDS: dict[str, tuple[dict[str, Any], torch.dtype, tuple[int, int], str]] = {
    "autofp8": ({"quant_method": "fp8", "activation_scheme": "static"}, torch.float8_e4m3fn, (0, 0), "weight_scale"),
    "fp8-named-as-blocks": ({"quant_method": "fp8"}, torch.float8_e4m3fn, (0, 0), "weight_scale_inv"),
    "fp8-blocks": (
        {"quant_method": "fp8", "weight_block_size": [12, 16]}, torch.float8_e4m3fn, (12, 16), "weight_scale_inv",
    ),
    "fp8-partial-blocks": (
        {"quant_method": "fp8", "weight_block_size": [16, 24]}, torch.float8_e4m3fn, (16, 24), "weight_scale_inv",
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, torch.float8_e4m3fn, (1, 0), "weight_scale"),
    "ct-fp8-channel": (compressed(type="float"), torch.float8_e4m3fn, (1, 0), "weight_scale"),
    "ct-int8-channel": (compressed(type="int"), torch.int8, (1, 0), "weight_scale"),
    "ct-int8-tensor": (compressed(type="int", strategy="tensor"), torch.int8, (0, 0), "weight_scale"),
    "ct-int8-group": (compressed(type="int", strategy="group", group_size=16), torch.int8, (1, 16), "weight_scale"),
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "mixtral"
    build("Mixtral", num_local_experts=4).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantize(w: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Values, scales, and what they mean, block by block."""
    (n, k), limit = w.shape, 127 if dtype == torch.int8 else 448
    rows, columns = block[0] or n, block[1] or k
    values, meant = torch.empty(w.shape, dtype=dtype), torch.empty(w.shape)
    scales = torch.empty(-(-n // rows), -(-k // columns))
    for i, j in np.ndindex(*scales.shape):
        at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
        scales[i, j] = w[at].float().abs().max() / limit
        x = w[at].float() / scales[i, j]
        values[at] = (x.round() if dtype == torch.int8 else x).to(dtype)
        meant[at] = values[at].float() * scales[i, j]
    return values, scales, meant


def write(kind: str, source: Path, root: Path) -> tuple[Path, Path]:
    """The model quantised, and in fp32 what that means."""
    config, dtype, block, scale = KINDS[kind]
    quantised, meant = {}, {}
    for name, w in tensors_of(source).items():
        quantised[name], meant[name] = w, w.float()
        if "proj" in name or "experts" in name:
            quantised[name], scales, meant[name] = quantize(w, dtype, block)
            stem = name.removesuffix("weight")
            quantised[stem + scale] = scales.reshape(()) if block == (0, 0) else scales
            if kind == "autofp8":
                quantised[stem + "input_scale"] = torch.ones(())
    values = config_of(source)
    return (
        save(root / "quantised", quantised, {**values, "quantization_config": config}),
        save(root / "meant", meant, values),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_folder_is_what_its_scales_say(
    kind: str, mixtral: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By default values stay as they are where kernels take the scales; where the last block of columns has fewer they
    become fp32, and we are told."""
    quantised, meant = write(kind, mixtral, tmp_path)
    theirs, _ = judge(meant, greedy=0)
    with caplog.at_level(logging.WARNING, "grok_engine"):
        llm = LLM(quantised, dtype="float32")
    assert error(llm.logits(TOKENS), theirs) <= 2e-5
    dtypes = {m.weight.dtype for layer in llm.model.layers for m in layer.modules() if isinstance(m, FusedWeight)}
    assert dtypes == {KINDS[kind][1]} | ({torch.float32} if kind == "fp8-partial-blocks" else set())
    assert ("fp8_e4m3 are held in fp32" in caplog.text) == (kind == "fp8-partial-blocks")
    stored = tensors_of(quantised)
    if kind != "fp8-partial-blocks":
        w2 = llm.model.layers[1].feed_forward.w2.matrices()
        assert torch.equal(
            w2[2].view(torch.int8), stored["model.layers.1.block_sparse_moe.experts.2.w2.weight"].view(torch.int8)
        )


def dequantised(model: Decoder) -> dict[str, torch.Tensor]:
    """Every matrix of the layers and the head, by its name in a checkpoint."""
    return {name: w for name, w in held(model) if w.dim() > 1 and name != "embed" and not name.endswith(".router")}


@pytest.mark.parametrize("weights", ["int8", "fp8", "bf16"])
def test_a_float_folder_is_rounded_while_it_is_loaded(weights: Any, mixtral: Path) -> None:
    """int8: within half a step of amax / 127 of each output channel; fp8: half a step of e4m3; bf16: as stored."""
    exact = dequantised(LLM(mixtral, dtype="float32", weights="fp32").model)
    found = LLM(mixtral, dtype="float32", weights=weights).model
    assert formats(found) == {**dict.fromkeys(formats(found), weights.replace("fp8", "fp8_e4m3")), "embed": "fp32"}
    for path, values in dequantised(found).items():
        w = exact[path]
        amax = w.abs().amax(-1, keepdim=True)
        steps = {"int8": 0.5 / 127 * amax, "fp8": torch.maximum(w.abs() / 15, amax * 2**-9 / 448), "bf16": 0 * amax}
        assert ((values - w).abs() <= steps[weights] * 1.001).all(), path
        if weights == "int8":
            assert (values - w).abs().max() > 0


@pytest.mark.parametrize("weights", ["int8", "fp8", "bf16", "fp32"])
@pytest.mark.parametrize("kind", ["fp8-blocks", "fp8-partial-blocks", "ct-int8-group", "autofp8"])
def test_a_quantised_folder_may_become_another_format(kind: str, weights: Any, mixtral: Path, tmp_path: Path) -> None:
    quantised, meant = write(kind, mixtral, tmp_path)
    wanted = dequantised(LLM(meant, dtype="float32").model)
    bounds = {"int8": 0.51 / 127, "fp8": 1 / 15, "bf16": 2**-8, "fp32": 2e-7}
    for path, values in dequantised(LLM(quantised, dtype="float32", weights=weights).model).items():
        amax = wanted[path].abs().amax(-1, keepdim=True)
        assert ((values - wanted[path]).abs() <= bounds[weights] * amax).all(), path


def test_fp16_is_read_as_fp32_and_nothing_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """bf16 would lose three bits of each value."""
    build("Llama").to(torch.float16).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "grok_engine"):
        model = LLM(tmp_path, dtype="float32").model
    stored = tensors_of(tmp_path)
    gate, up = (stored[f"model.layers.1.mlp.{name}_proj.weight"].float() for name in ("gate", "up"))
    assert torch.equal(model.layers[1].feed_forward.w13.matrices()[0], torch.cat([gate, up]))
    assert torch.equal(model.embed.matrices()[0], stored["model.embed_tokens.weight"].float())
    assert "fp16 are held in fp32" in caplog.text


def test_experts_in_several_float_formats_become_fp32(mixtral: Path, tmp_path: Path) -> None:
    stored = tensors_of(mixtral)
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    stored |= {name.format(1): stored[name.format(1)].half(), name.format(2): stored[name.format(2)].float() / 3}
    folder = save(tmp_path, stored, config_of(mixtral))
    whole = torch.stack([stored[name.format(e)].float() for e in range(4)])
    checkpoint = open_checkpoint(folder, read_config(folder))
    assert torch.equal(checkpoint.read("layers.0.moe.down")[0], whole)
    assert torch.equal(LLM(folder, weights="fp32").model.layers[0].feed_forward.w2.matrices(), whole)


def test_zero_points_of_a_symmetric_scheme_are_zero(mixtral: Path, tmp_path: Path) -> None:
    folder, _ = write("ct-int8-channel", mixtral, tmp_path)
    tensors, values = tensors_of(folder), config_of(folder)
    name = "model.layers.0.self_attn.q_proj.weight_zero_point"
    old = {key: value for key, value in values.items() if key != "quantization_config"}
    old["compression_config"] = values["quantization_config"]
    LLM(save(folder, {**tensors, name: torch.zeros(32, 1, dtype=torch.int8)}, old))
    with pytest.raises(CheckpointError, match=f"{name} is not zero"):
        LLM(save(folder, {**tensors, name: torch.ones(32, 1, dtype=torch.int8)}, old))


def test_asymmetric_integers_are_dequantised(mixtral: Path, tmp_path: Path) -> None:
    """q − z may need nine bits."""
    folder, meant = write("ct-int8-group", mixtral, tmp_path)
    tensors, expected, generator = tensors_of(folder), tensors_of(meant), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        w, scales = name.removesuffix("_scale"), tensors[name]
        zeros = torch.randint(-128, 128, scales.shape, generator=generator).to(torch.int8)
        tensors[w + "_zero_point"] = zeros
        shifted = tensors[w].short() - zeros.short().repeat_interleave(16, 1)
        expected[w] = shifted.float() * scales.repeat_interleave(16, 1)
    config = compressed(type="int", strategy="group", group_size=16, symmetric=False)
    values = config_of(meant)
    found = LLM(save(folder, tensors, {**values, "quantization_config": config}), dtype="float32").model
    exact = dequantised(LLM(save(meant, expected, values), dtype="float32").model)
    assert all(torch.equal(values, exact[path]) for path, values in dequantised(found).items())


def test_groups_of_several_formats_and_what_is_ignored(
    mixtral: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Attention in e4m3 by channel and experts in int8 by group, with activations and keys quantised on top."""
    (tmp_path / "e4m3").mkdir()
    attention, meant = write("ct-fp8-channel", mixtral, tmp_path / "e4m3")
    experts, more = write("ct-int8-group", mixtral, tmp_path)
    tensors = {name: x for name, x in tensors_of(attention).items() if "experts" not in name}
    tensors |= {name: x for name, x in tensors_of(experts).items() if "experts" in name}
    exact = tensors_of(meant) | {name: x for name, x in tensors_of(more).items() if "experts" in name}
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    groups = {
        "a": {
            "weights": {**CHANNEL, "type": "float"},
            "format": "float-quantized",
            "input_activations": {"num_bits": 8},
        },
        "b": {"weights": {**CHANNEL, "strategy": "group", "group_size": 16}, "format": "int-quantized"},
    }
    config = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed",
        "config_groups": groups, "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }  # fmt: skip
    values = config_of(mixtral)
    with caplog.at_level(logging.WARNING, "grok_engine"):
        model = LLM(save(tmp_path / "both", tensors, {**values, "quantization_config": config}), dtype="float32").model
    expected = dequantised(LLM(save(tmp_path / "exact", exact, values), dtype="float32").model)
    assert all(torch.equal(x, expected[path]) for path, x in dequantised(model).items())
    held_in = formats(model)
    assert held_in.pop("embed") == "fp32"
    assert set(held_in.values()) == {"fp8_e4m3", "int8", "bf16"}
    assert "kv_cache_scheme and input_activations of " in caplog.text


def test_a_quantised_router_and_head_are_dequantised(mixtral: Path, tmp_path: Path) -> None:
    """Some tools leave nothing out, though the router is held in fp32."""
    stored = tensors_of(mixtral)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    values, scales, meant = quantize(stored[router], torch.int8, (1, 0))
    stored |= {router: values, router + "_scale": scales}
    folder = save(tmp_path, stored, {**config_of(mixtral), "quantization_config": compressed(type="int")})
    assert torch.equal(LLM(folder, dtype="float32").model.layers[0].feed_forward.router.weight, meant)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "quantisation 'hqq' is not served: expected fp8, .* gptq or awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantisation 'bitsandbytes' is not served"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' is not served"),
        ({"quant_method": "fp8", "weight_block_size": [16]}, r"weight_block_size=\[16\]: expected positive integers"),
        (compressed(num_bits=4, type="float"), "weights of 4 bits, type='float'"),
        (compressed(num_bits=16), "weights of 16 bits"),
        (compressed(symmetric=False, type="float"), "type='float', symmetric=False"),
        (compressed(symmetric=False), "missing .*q_proj.weight_zero_point: the quantisation is not symmetric"),
        (compressed(strategy="tensor_group"), "strategy='tensor_group'"),
        ({**compressed(), "transform_config": {"config_groups": {}, "x": 1}}, "transform_config"),
        ({"quant_method": "compressed-tensors"}, "expected at least one group"),
        (7, "quantization_config=7 is not an object"),
        (compressed(type="int", strategy="group", group_size=20), r"is I8 .*blocks of \(1, 20\)"),
        (compressed(type="float"), r"w1.weight is I8 \(48, 32\): expected bf16"),
        (None, r"is I8 \(32, 32\): expected bf16, fp16 or fp32"),
    ],
)
def test_what_is_not_served_is_said(config: Any, message: str, mixtral: Path, tmp_path: Path) -> None:
    folder, _ = write("ct-int8-channel", mixtral, tmp_path)
    values = config_of(folder)
    (folder / "config.json").unlink()
    save(folder, tensors_of(folder), {**values, "quantization_config": config})
    with pytest.raises(CheckpointError, match=message):
        LLM(folder)
