"""The mixtures of types that llama.cpp's quantiser writes: held at their own bits, and right in products and texts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from grok_engine import LLM, SamplingParams
from grok_engine.checkpoint.gguf.blocks import TYPES
from grok_engine.checkpoint.gguf.reader import GGUFCheckpoint
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.cli import main
from grok_engine.layers.linear import Linear, head_product
from grok_engine.layers.weight import NamedTensor
from grok_engine.loading.fill import load
from grok_engine.loading.resolve import read_config
from grok_engine.loading.slots import Slot, slots, spec_of
from grok_engine.models.decoder import Decoder
from grok_kernels import Weight, cpu
from grok_kernels.reference.quantize import dequantize_weight
from tests.checkpoint import gguf_models as models
from tests.checkpoint import hf_models

LAYERS = 8


def more_bits(layer: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and the last eighth of the layers, and every third between them."""
    return layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2


# By the name of a recipe: its own type, the type of attn_v and of ffn_down in a layer, and of attn_output of a mixture
# of eight experts, as `llama_tensor_get_type` in llama-quant.cpp chooses them. There attn_k and attn_v are Q8_0 too,
# and the output head is Q6_K, unless all is Q8_0.
Layer = Callable[[int], Kind]
RECIPES: dict[str, tuple[Kind, Layer, Layer, Kind]] = {
    "Q4_K_M": (
        Kind.Q4_K, lambda i: Kind.Q6_K if more_bits(i) else Kind.Q4_K,
        lambda i: Kind.Q6_K if more_bits(i) else Kind.Q4_K, Kind.Q5_K,
    ),
    "Q4_K_S": (
        Kind.Q4_K, lambda i: Kind.Q5_K if i < 4 else Kind.Q4_K,
        lambda i: Kind.Q5_K if i < LAYERS // 8 else Kind.Q4_K, Kind.Q5_K,
    ),
    "Q5_K_M": (
        Kind.Q5_K, lambda i: Kind.Q6_K if more_bits(i) else Kind.Q5_K,
        lambda i: Kind.Q6_K if more_bits(i) else Kind.Q5_K, Kind.Q5_K,
    ),
    "Q6_K": (Kind.Q6_K, lambda i: Kind.Q6_K, lambda i: Kind.Q6_K, Kind.Q6_K),
    "Q4_0": (Kind.Q4_0, lambda i: Kind.Q4_0, lambda i: Kind.Q4_1 if i < LAYERS // 8 else Kind.Q4_0, Kind.Q4_0),
    "Q5_0": (Kind.Q5_0, lambda i: Kind.Q5_0, lambda i: Kind.Q5_1 if i < LAYERS // 8 else Kind.Q5_0, Kind.Q5_0),
    "Q8_0": (Kind.Q8_0, lambda i: Kind.Q8_0, lambda i: Kind.Q8_0, Kind.Q8_0),
}  # fmt: skip


def recipe(name: str, experts: int = 0) -> dict[str, Kind]:
    """Types by the ends of tensors' names, for `models.write_model`; what is tested first comes first."""
    own, attn_v, ffn_down, attn_output = RECIPES[name]
    kinds = {"output": own if own == Kind.Q8_0 else Kind.Q6_K}
    for i in range(LAYERS):
        attention = {"attn_k": Kind.Q8_0, "attn_v": Kind.Q8_0, "attn_output": attn_output} if experts else {}
        layer = {"attn_k": own, "attn_v": attn_v(i), "attn_output": own} | attention
        for part in ("attn_q", "ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps"):
            layer[part] = own
        layer |= {"ffn_down": ffn_down(i), "ffn_down_exps": ffn_down(i)}
        kinds |= {f"blk.{i}.{part}": kind for part, kind in layer.items()}
    return {**kinds, "token_embd": own}


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_takes_more_bits_in_memory_than_its_types_have(name: str, experts: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    models.write_model(path, recipe(name, experts), experts, layers=LAYERS)
    model = Decoder(config := read_config(path), torch.bfloat16)
    found = slots(model, open_checkpoint(path, config))
    kinds = {kind.format for kind in TYPES.values()} - {"fp32", "bf16"}
    held = [slot for slot in found if not isinstance(slot.module, NamedTensor)]
    assert {slot.spec.format for slot in held} <= kinds
    for slot in held:
        assert all(slot.spec == spec_of(info) for info in slot.sources), slot.path


@pytest.mark.parametrize(("experts", "head"), [(0, None), (8, None), (8, "int8")])
def test_a_plan_counts_what_loading_holds(
    experts: int, head: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `generate --stats` counts it."""
    path = tmp_path / "model.gguf"
    tensors = models.write_model(path, recipe("Q4_K_M", experts), experts, layers=LAYERS)
    llm = LLM(path, head=head, num_pages=4)
    modules = (getattr(module, "weight", None) for module in llm.model.modules())
    weights = [weight for weight in modules if isinstance(weight, Weight)]
    asked = ["plan", str(path), *(["--head", head] if head else [])]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stored_bytes"] == sum(data.nbytes for data, _ in tensors.values())
    assert found["on_cpu"] == {
        "nbytes": sum(weight.nbytes for weight in weights),
        "bits": 8 * sum(weight.nbytes for weight in weights) / sum(math.prod(weight.shape) for weight in weights),
        "formats": list(dict.fromkeys(weight.format for weight in weights)),
    }
    assert main(asked) == 0
    assert f"{found['on_cpu']['bits']:.2f} bits each (int4_k, " in capsys.readouterr().out
    llm.close()


def test_gate_and_up_of_4_and_5_bits_are_held_in_5(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As `--tensor-type` may ask for. Other mixtures in one weight become fp32, and a warning says so once."""
    kinds = {"ffn_gate_exps": Kind.Q4_K, "ffn_up_exps": Kind.Q5_K, "ffn_down_exps": Kind.Q6_K}
    path = tmp_path / "model.gguf"
    for up, format in ((Kind.Q5_K, "int5_k"), (Kind.Q6_K, "fp32")):
        wanted = models.meaning(models.write_model(path, {**kinds, "ffn_up_exps": up}, models.EXPERTS))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "grok_engine"):
            layer = LLM(path, dtype="float32", num_pages=4).model.layers[1].feed_forward
        assert layer.w13.weight.format == format
        w13 = layer.w13.weight.with_layout("rows")
        values = [dequantize_weight(w13, expert) for expert in range(models.EXPERTS)]
        parts = wanted["layers.1.moe.gate"], wanted["layers.1.moe.up"]
        np.testing.assert_array_equal(torch.stack(values).numpy(), np.concatenate(parts, axis=1))
        about = [message for message in caplog.messages if "are held in fp32" in message]
        assert len(about) == (2 if format == "fp32" else 0), caplog.messages  # Q4_K and Q6_K


@pytest.mark.parametrize("kind", [Kind(n) for n in TYPES if TYPES[n].split], ids=lambda kind: kind.name)
def test_products_of_every_type_at_odd_sizes(kind: Kind, tmp_path: Path) -> None:
    """From a file through loading to a product, against the package's values in fp64, on every instruction set."""
    columns = gguf.GGML_QUANT_SIZES[kind][0]
    shapes = [(1, columns), (67, 3 * columns), (192, 5 * columns)]
    rng, writer = np.random.default_rng(0), models.Writer(path := tmp_path / "model.gguf", layers=1)
    stored = {f"w{i}": models.stored(shape, kind, rng) for i, shape in enumerate(shapes)}
    for name, data in stored.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.finish()
    checkpoint = GGUFCheckpoint(path, models.config())
    for name, (n, k) in zip(stored, shapes, strict=True):
        linear, info = Linear(k, {name: n}), checkpoint.tensors[name]
        load(Slot(name, linear, (info,), spec_of(info)), checkpoint, "cpu")
        w_NK = torch.from_numpy(models.dequantized(stored[name], kind)).double()
        assert linear.weight.layout == ("panels" if n % 64 == 0 else "rows")
        for m in (1, 7):
            x_MK = torch.from_numpy(rng.standard_normal((m, k), dtype=np.float32)).bfloat16()
            expected, size = x_MK.double() @ w_NK.T, x_MK.double().abs() @ w_NK.T.abs()
            for isa in cpu.isas():
                with cpu.use_isa(isa):
                    y_MN = head_product(x_MK, linear, "none")
                assert float(((y_MN - expected).abs() / size).max()) <= 1e-6, (isa, m, n, k)


def test_a_mixture_says_what_transformers_says(tmp_path: Path) -> None:
    """Q4_K_M, which transformers' own reader of GGUF dequantises."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = tmp_path / "model.gguf"
    models.write_model(path, recipe("Q4_K_M"), layers=LAYERS)
    config = LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    theirs = LlamaForCausalLM(config).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    assert theirs.load_state_dict(read, strict=False).missing_keys == []
    ids = [5, 17, 250, 3, 90, 41, 199]
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0]
        greedy = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, len(ids) :]
    llm = LLM(path, dtype="float32", num_pages=16)
    assert hf_models.error(llm.logits(ids), logits.numpy()) <= 2e-5
    (output,) = llm.generate([ids], SamplingParams(max_tokens=24, temperature=0, ignore_eos=True))
    assert list(output.outputs[0].token_ids) == greedy.tolist()
    llm.close()
