"""Activations quantised to 8 bits: what is asked for, what it costs, and that every invariance holds with them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grok_kernels
from grok_engine import LLM, LLMEngine, SamplingParams
from grok_engine.cli import main
from grok_engine.loading.convert import convert
from grok_engine.models.families import PRESETS
from tests.e2e.test_goldens import DEEP, GROUPED, WIDE, error, golden, model, prompts
from tests.engine.test_graphs import small

# Bounds in units of the reference's own error in bf16: about the ratio of the formats' rounding errors, which for a row
# of normal numbers is 4 for int8 with a scale per group of 128, and 16 for e4m3
BOUNDS = {"int8": 4, "fp8": 16}


@pytest.mark.parametrize("folder", [GROUPED, DEEP, WIDE], ids=lambda folder: folder.name)
@pytest.mark.parametrize(("weights", "activations"), [(None, "int8"), (None, "fp8"), ("fp8", "fp8")])
def test_quality(folder: Path, weights: Any, activations: Any) -> None:
    """And not as good as without: then nothing was rounded."""
    g = golden(folder)
    llm = LLM(folder, weights=weights, activations=activations, device=model(folder).config.device)
    pairs = [(llm.logits(g[f"p{i}_tokens"].tolist()).cpu(), g[f"p{i}_f32_logits"]) for i in prompts(folder)]
    ours = np.linalg.norm([error(a, b) for a, b in pairs])
    reference = np.linalg.norm([error(g[f"p{i}_bf16e_logits"], g[f"p{i}_f32_logits"]) for i in prompts(folder)])
    assert 1.2 * reference < ours <= BOUNDS[activations] * reference


@pytest.mark.parametrize("activations", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["grok-1", "grok-2"])
def test_every_product(name: str, activations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v, the output projection, and the experts, dense ones too. The output head's rows become int8 where its
    weights are integers: grok-2's, while grok-1's are those of the embedding, in bf16."""
    seen: list[Any] = []
    moe, grouped_gemm = grok_kernels.moe, grok_kernels.grouped_gemm

    def spied_moe(*args: Any) -> Any:
        seen.append(args[-1])
        return moe(*args)

    def spied_gemm(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append((x.dtype, options["out_dtype"]))
        return grouped_gemm(x, *args, **options)

    monkeypatch.setattr(grok_kernels, "moe", spied_moe)
    monkeypatch.setattr(grok_kernels, "grouped_gemm", spied_gemm)
    engine = LLMEngine(small(PRESETS[name]), activations=activations, num_pages=2)
    engine.logits([5, 6, 7])
    product = ({"fp8": torch.float8_e4m3fn, "int8": torch.int8}[activations], torch.bfloat16)
    layer = [product, product, *[activations] * (2 if name == "grok-2" else 1)]
    head = torch.int8 if (name, activations) == ("grok-2", "int8") else torch.bfloat16
    assert seen == [*layer, *layer, (head, torch.float32)]


@pytest.mark.parametrize("name", ["grok-1", "grok-2"])
def test_norms_quantise_where_that_is_one_pass_and_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference has all the ops; a backend that has not keeps to its own."""
    engine = LLMEngine(small(PRESETS[name]), activations="fp8", num_pages=2)
    seen: list[str] = []
    for op in ("sandwich_norm_fp8", "moe_fp8", "moe", "quantize_fp8"):
        monkeypatch.setattr(grok_kernels, op, partial(spied, op, getattr(grok_kernels, op), seen))
    with grok_kernels.use_backend("reference"):
        fused = engine.logits([5, 6, 7])
        layers, experts = 2, 2 if name == "grok-2" else 1
        # two norms a layer, but for the last; the first projections of all, and each output projection
        expected = {"sandwich_norm_fp8": 2 * layers - 1, "moe_fp8": experts * layers, "quantize_fp8": 1 + layers}
        assert Counter(seen) == expected
        monkeypatch.setattr(grok_kernels, "fuses", lambda op, parts, device: False)
        assert torch.equal(engine.logits([5, 6, 7]), fused)
    assert Counter(seen)["moe"] == experts * layers
    monkeypatch.undo()
    if grok_kernels.backends()["moe"]["cpu"].available and engine.config.device == "cpu":
        assert not grok_kernels.fuses("moe_fp8", ("moe",), "cpu")
        with grok_kernels.use_backend("cpu"):
            assert not grok_kernels.fuses("sandwich_norm_fp8", ("sandwich_norm",), "cpu")


@pytest.mark.parametrize("activations", ["none", "fp8"])
def test_the_router_groups_where_that_is_one_pass_and_changes_no_bit(
    activations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LLMEngine(small(PRESETS["grok-1"]), activations=activations, num_pages=2)
    seen: list[str] = []
    for op in ("route_and_group", "route_topk", "group_tokens"):
        monkeypatch.setattr(grok_kernels, op, partial(spied, op, getattr(grok_kernels, op), seen))
    layers = 2
    with grok_kernels.use_backend("reference"):
        fused = engine.logits([5, 6, 7])
        assert Counter(seen) == {"route_and_group": layers}
        monkeypatch.setattr(grok_kernels, "fuses", lambda op, parts, device: op != "route_and_group")
        seen.clear()
        assert torch.equal(engine.logits([5, 6, 7]), fused)
        assert Counter(seen) == {"route_topk": layers}
    monkeypatch.undo()
    if grok_kernels.backends()["moe"]["cpu"].available:
        with grok_kernels.use_backend("cpu"):  # its `moe` groups by itself
            assert not grok_kernels.fuses("route_and_group", ("route_topk", "moe"), "cpu")


def spied(op: str, function: Any, seen: list[str], *args: Any, **options: Any) -> Any:
    seen.append(op)
    return function(*args, **options)


@pytest.mark.parametrize(("weights", "activations"), [("fp8", "fp8"), (None, "int8")])
def test_the_same_bits_in_any_batch(weights: Any, activations: Any) -> None:
    engine = LLMEngine(GROUPED, weights=weights, activations=activations, num_pages=40)
    prompt = list(range(3, 53))
    whole = engine.logits(prompt)
    for chunk in (1, 7, 17, 32):
        assert torch.equal(engine.logits(prompt, chunk=chunk), whole), chunk
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    texts = [prompt[:9], prompt[20:], [7], prompt]
    llm = LLM(GROUPED, weights=weights, activations=activations, num_pages=40)
    together = [output.outputs[0] for output in llm.generate(texts, params)]
    for text, found in zip(texts, together, strict=True):
        (alone,) = llm.generate(text, params)
        assert (found.token_ids, found.logprobs) == (alone.outputs[0].token_ids, alone.outputs[0].logprobs)


def test_what_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """e4m3 weights bring e4m3 activations where the chip multiplies e4m3, released int8 none; a choice is obeyed."""

    def chosen(folder: Any, **options: Any) -> Any:
        return LLMEngine(folder, num_pages=2, **options).config.activations

    fp8 = convert("tiny", tmp_path / "fp8", weights="fp8")
    assert chosen("tiny", weights="fp8") == chosen(fp8) == "none"  # a CPU
    monkeypatch.setattr(grok_kernels, "multiplies_fp8", lambda device: True)
    assert chosen("tiny", weights="fp8") == chosen(fp8) == "fp8"
    assert chosen("tiny") == chosen("tiny", weights="bf16") == "none"
    assert chosen(fp8, activations="none") == "none"
    assert chosen("tiny", activations="int8") == "int8"


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "--token-ids", "5,6,7", "--max-tokens", "8", "--temperature", "0", "--activations"]
    assert main([*args, "int8"]) == 0
    assert len(capsys.readouterr().out.split(",")) == 8
    assert main([*args, "int4"]) == 2
    assert "'int4' is not one of 'none', 'fp8', 'int8'" in capsys.readouterr().err
