"""An output head in a format of its own: what it is rounded from, what stays as it was, and what it takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import grok_kernels
from grok_engine import LLM, ConfigError, LLMEngine, SamplingParams
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.rows import rounded
from grok_engine.config import EngineConfig
from grok_engine.layers.linear import Linear
from grok_engine.loading.build import build_model
from grok_engine.loading.convert import convert
from grok_engine.loading.fill import fill
from grok_engine.loading.resolve import read_config
from grok_engine.models.decoder import Decoder
from grok_engine.runtime import memory
from grok_engine.tools.plan import plan
from grok_kernels import Weight
from grok_kernels.chips import GPUS
from grok_kernels.reference.quantize import dequantize_weight
from tests.checkpoint import gguf_models
from tests.checkpoint.gguf_models import Kind
from tests.checkpoint.hf_models import build
from tests.engine.test_plan import GROK
from tests.held import formats, held

GOLDEN = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"  # tied, with multipliers
IDS = [5, 6, 7, 90, 3, 2, 9]


def make(kind: str, folder: Path) -> Path:
    """A model of each format of files: the release's, which is tied, of the hub, or GGUF."""
    if kind == "release":
        return GOLDEN
    tied, path = "untied" not in kind, folder / kind.replace(" ", "-")
    if "hub" in kind:
        build("Llama", num_hidden_layers=1, tie_word_embeddings=tied).save_pretrained(path)
        return path
    gguf_models.write_model(path := path.with_suffix(".gguf"), Kind.F32, tied=tied, layers=1)
    return path


def means(llm: LLM) -> torch.Tensor:
    """w_VD of the head, in fp32."""
    head = llm.model.lm_head
    assert isinstance(head, Linear)
    return dequantize_weight(head.weight.with_layout("rows"), 0)


SOURCES = ["release", "hub", "hub untied", "gguf", "gguf untied"]


@pytest.mark.parametrize("kind", SOURCES)
def test_the_logits_are_those_of_the_rounded_head(kind: str, tmp_path: Path) -> None:
    """Rounded from the checkpoint's values by output channel; all else is what it was, and so are the hidden states."""
    path = make(kind, tmp_path)
    plain, llm = (LLM(path, dtype="float32", head=head, num_pages=8) for head in (None, "int8"))
    original, found = dict(held(plain.model)), dict(held(llm.model))
    own = "lm_head" if "untied" in kind else "embed"
    q_VD, scale_V1 = rounded(original[own].clone(), "int8")
    assert formats(llm.model) == formats(plain.model) | {"lm_head": "int8"}
    assert torch.equal(means(llm), q_VD * scale_V1)
    tokens = torch.arange(96, dtype=torch.int32)
    assert torch.equal(*(grok_kernels.weight_rows(each.model.embed.weight, tokens) for each in (plain, llm)))
    for name in original.keys() - {own}:
        assert torch.equal(found[name], original[name]), name
    exact = LLM(path, dtype="float32", head="fp32", num_pages=8)
    if own == "embed":
        assert exact.model.lm_head is None  # which lies in fp32 already
        exact = LLM(path, dtype="float32", head="int8", num_pages=8)
    exact.model.lm_head.hold(Weight.of(values=means(llm)[None].contiguous()))
    wanted, unrounded = exact.logits(IDS), plain.logits(IDS)
    assert torch.allclose(llm.logits(IDS), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    loss = (wanted - unrounded).norm() / unrounded.norm()
    assert 1e-4 < loss < 0.03


@pytest.mark.parametrize("kind", ["release", "gguf untied"])
def test_of_a_converted_checkpoint_the_head_alone_is_not_taken_as_it_lies(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    out = convert(path, tmp_path / "packed", dtype="float32")
    expected = LLM(path, dtype="float32", head="int8", num_pages=8).logits(IDS)
    for options in ({}, {"mmap": True}):
        llm = LLM(out, dtype="float32", head="int8", num_pages=8, **options)
        assert torch.equal(llm.logits(IDS), expected), options
        of_file = llm.model.embed.weight.values.untyped_storage().data_ptr()
        assert llm.model.final_norm.weight.untyped_storage().data_ptr() == of_file  # one block, or the mapped file
        assert llm.model.lm_head.weight.values.untyped_storage().data_ptr() != of_file


def test_an_embedding_that_lies_in_the_format_serves(tmp_path: Path) -> None:
    """Q8_0 is held at its own bits; its scales stay beside other weights too."""
    path = tmp_path / "model.gguf"
    gguf_models.write_model(path, Kind.Q8_0, tied=True, layers=1)
    plain, same = (LLM(path, head=head, num_pages=4) for head in (None, "int8"))
    assert plain.model.lm_head is same.model.lm_head is None
    assert formats(plain.model)["embed"] == "int8"
    wider = LLM(path, weights="bf16", head="int8", num_pages=4)
    assert (formats(wider.model)["embed"], formats(wider.model)["lm_head"]) == ("bf16", "int8")
    assert torch.equal(means(wider), dict(held(plain.model))["embed"])
    untied = path.with_name("untied.gguf")
    gguf_models.write_model(untied, {"output": Kind.Q8_0}, layers=1)
    assert formats(LLM(untied, num_pages=4).model)["lm_head"] == "int8"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["int8", "int4", "fp8", "bf16"])
def test_random_weights(head: Any, tied: bool) -> None:
    config = replace(read_config(GOLDEN), tie_embeddings=tied, num_layers=1)
    llm = LLM(config, dtype="float32", head=head, num_pages=8)
    plain = LLM(config, dtype="float32", num_pages=8)
    assert formats(llm.model)["lm_head"] == {"fp8": "fp8_e4m3"}.get(head, head)
    a, b = llm.logits(IDS), plain.logits(IDS)
    assert (a - b).norm() < 0.15 * b.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_the_others(dtype: Any) -> None:
    """Bit for bit, for one row and for several tiles of them; asleep and awake again the head is the same."""
    engine = LLMEngine(GOLDEN, dtype=dtype, head="int8", num_pages=64)
    prompts = [[5 + 7 * i, 6, 90 + i][: 1 + i % 3] for i in range(9)]

    def run(chosen: list[int]) -> dict[str, Any]:
        for i in chosen:
            engine.add_request(str(i), prompts[i], SamplingParams(max_tokens=4 + i % 3, logprobs=3, seed=i))
        done: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                answer = output.outputs[0]
                if output.finished:
                    done[output.request_id] = answer.token_ids, [list(d.items()) for d in answer.logprobs]
        return done

    together = run(list(range(9)))
    engine.sleep()
    engine.wake_up()
    assert formats(engine.model)["lm_head"] == "int8"
    assert {str(i): run([i])[str(i)] for i in range(9)} == together


def test_progress_counts_what_is_read_twice() -> None:
    checkpoint, calls = open_checkpoint(GOLDEN, config := read_config(GOLDEN)), list[tuple[int, int]]()
    fill(Decoder(config, torch.float32, head="int8"), checkpoint, progress=lambda *call: calls.append(call))
    total = sum(info.nbytes for info in checkpoint.tensors.values()) + checkpoint.tensors["embed"].nbytes
    assert {of for _, of in calls} == {total} == {calls[-1][0]}
    assert all(a < b for (a, _), (b, _) in pairwise(calls))


# Memory


@pytest.mark.parametrize("kind", ["release", "gguf untied", "packed", "mapped", "random"])
def test_memory_is_asked_for_the_head_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(kind, tmp_path) if kind in SOURCES else GOLDEN
    config = read_config(path)
    folder = convert(GOLDEN, tmp_path / "out") if kind in ("packed", "mapped") else path
    counted: list[int] = []

    def size(head: Any) -> int:
        options = EngineConfig(model=config, head=head, mmap=kind == "mapped")

        def fit(config: EngineConfig, loading: Any) -> EngineConfig:
            counted.append(loading(None)[0])
            return memory.fit(config, loading, cut=True)

        model, _ = build_model(options, None if kind == "random" else folder, fit=fit)
        return sum(p.numel() * p.element_size() for p in model.parameters())

    plain, own = size(None), size("int8")
    v, d = config.vocab_size, config.d_model
    if "untied" in kind:
        assert own - plain == counted[1] - counted[0] == v * (d + 4) - 4 * v * d
    else:
        assert own - plain == counted[1] - counted[0] == v * (d + 4)
    assert counted == ([0, v * (d + 4)] if kind == "mapped" else [plain, own])


def test_a_plan_for_gpus_counts_its_bytes() -> None:
    whole, own = (plan(GROK, chip="h100-80gb", gpus=8, head=head, context=1) for head in ("bf16", "int8"))
    matrix = (GROK.d_model + 4) * GROK.vocab_size // 8
    assert own.weight_bytes - whole.weight_bytes == matrix  # the embedding stays
    less = (2 * GROK.d_model * GROK.vocab_size // 8 - matrix) / GPUS["h100-80gb"].bandwidth
    assert whole.decode.memory_s - own.decode.memory_s == pytest.approx(less)


# Refusals


def test_a_device_without_the_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROK_KERNELS_BACKEND", "triton")
    with pytest.raises(ConfigError, match="head='int4' on cpu: its kernels do not multiply by int4"):
        LLM("tiny", head="int4")
