"""The engine on a GPU: memory, graphs, and that no step synchronises with the device before sampling."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import grok_kernels
from grok_engine import LLM, LLMEngine, SamplingParams
from grok_engine.loading.convert import convert
from grok_engine.models.families import PRESETS
from grok_engine.runtime.memory import GPU_SHARE
from grok_engine.runtime.plan import Entry, StepPlan
from grok_engine.sampling.logprobs import token_logprobs
from grok_kernels.chips import GPUS, chip_name, multiplies_fp8
from tests.engine.test_graphs import small
from tests.engine.test_invariance import DEEP, DEVICE, DTYPES, GOLDENS, GROUPED, SMALL, facts, make_traffic, run

ON_GPU = DEVICE.startswith("cuda")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="of the driver's own")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def engine_of(model: Any, **options: Any) -> LLMEngine:
    return LLMEngine(model if model == "tiny" else GOLDENS / model, device=DEVICE, **options)


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=map("-".join, DTYPES))
@pytest.mark.parametrize("model", [SMALL, GROUPED, DEEP, "tiny"])
def test_with_graphs_as_without(model: str, dtype: Any, kv_dtype: Any) -> None:
    options = {"dtype": dtype, "kv_dtype": kv_dtype, "max_num_seqs": 12, "max_num_batched_tokens": 40, "num_pages": 60}
    plain = engine_of(model, enforce_eager=True, **options)
    graphed = engine_of(model, **options)
    vocab = plain.config.model.vocab_size
    traffic = make_traffic(21, vocab, requests=10)
    expected = {i: facts(output) for i, output in run(plain, traffic).items()}
    assert {i: facts(output) for i, output in run(graphed, traffic).items()} == expected
    assert plain.runner.graphs is None
    if ON_GPU:
        assert graphed.runner.graphs is not None
        assert len(graphed.runner.graphs._runs) >= 3


def test_the_reference_is_not_captured() -> None:
    """It still serves, with the same text, in an engine that has graphs."""
    llm = LLM("tiny", device=DEVICE, dtype="float32", num_pages=40)
    prompt = llm.encode("My dear Watson,")
    (fast,) = llm.generate(prompt, GREEDY)
    with grok_kernels.use_backend("reference"):
        (defined,) = llm.generate(prompt, GREEDY)
    assert fast.outputs[0].token_ids == defined.outputs[0].token_ids


@contextmanager
def no_waiting() -> Iterator[None]:
    """Makes synchronising with the device an error."""
    if not ON_GPU:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("weights", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("name", ["grok-1", "grok-2", "mixtral-8x7b", "mistral-7b"])
def test_no_step_waits_for_the_device(name: str, weights: Any) -> None:
    """Prompts and decode steps, with and without graphs, including logits and page copies."""
    engine = LLMEngine(small(PRESETS[name]), device=DEVICE, weights=weights, num_pages=8, max_num_seqs=4)
    eager = LLMEngine(small(PRESETS[name]), device=DEVICE, weights=weights, num_pages=8, enforce_eager=True)
    prompt = StepPlan((Entry(list(range(3, 20)), 0, [0, 1], num_logits=1),))
    decode = StepPlan((Entry([5], 17, [0, 1], num_logits=1),), copies=((0, 2), (1, 3)))
    for runner in (engine.runner, eager.runner):
        for _ in range(2):  # the first compiles and captures
            runner.logits(runner.forward(prompt))
            runner.logits(runner.forward(decode))
        with no_waiting():
            runner.logits(runner.forward(prompt))
            runner.logits(runner.forward(decode))


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_no_kernel_is_compiled_while_serving(weights: Any) -> None:
    """Triton compiles everything when the engine is built, for any batch."""
    triton = pytest.importorskip("triton")
    engine = LLMEngine(small(PRESETS["grok-1"]), device=DEVICE, weights=weights, num_pages=60, max_num_seqs=12)
    compiled: list[str] = []
    rng = random.Random(5)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = lambda **kernel: compiled.append(str(kernel["repr"]))
        for i in range(40):
            prompt = rng.choices(range(3, 60), k=rng.choice([1, 2, 5, 16, 33, 64]))
            params = SamplingParams(
                temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randint(1, 9), seed=i, ignore_eos=True
            )
            engine.add_request(str(i), prompt, params)
            engine.step()
        while engine.has_unfinished_requests():
            engine.step()
    assert not compiled


def test_pages_are_what_is_left() -> None:
    """After the largest step and all graphs, the device still has the memory that GPU_SHARE leaves."""
    model = replace(PRESETS["grok-1"], num_layers=1, vocab_size=32768) if ON_GPU else small(PRESETS["grok-1"])
    engine = LLMEngine(model, device=DEVICE, weights="fp8", max_num_seqs=16)
    pages = engine.runner.num_pages
    assert pages * engine.config.page_size >= engine.config.max_len
    rng = random.Random(3)
    for i in range(16):
        prompt = rng.choices(range(3, 60), k=rng.choice([5, 200] if ON_GPU else [5, 20]))
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=6 + 2 * i, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        assert total - free <= (GPU_SHARE + 0.05) * total


@pytest.mark.parametrize("vocab", [97, 128, 1000])
def test_token_logprobs_do_not_depend_on_where_a_row_begins(vocab: int) -> None:
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tokens = list(range(9))
    together = token_logprobs(logits, tokens, [3] * 9)
    for i in range(9):
        assert token_logprobs(logits[i : i + 1], [i], [3]) == together[i : i + 1]
    for found, exact in zip(together, token_logprobs(logits.cpu(), tokens, [3] * 9), strict=True):
        assert found.rank == exact.rank
        assert found.logprob == pytest.approx(exact.logprob, abs=1e-5)
        assert [token for token, *_ in found.top] == [token for token, *_ in exact.top]


def test_a_converted_folder(tmp_path: Path) -> None:
    plain = LLM("tiny", device=DEVICE, num_pages=8)
    converted = LLM(convert("tiny", tmp_path / "out"), device=DEVICE, num_pages=8)
    assert torch.equal(plain.logits([5, 6, 7, 8]), converted.logits([5, 6, 7, 8]))


@needs_gpu
def test_e4m3_weights_meet_e4m3_rows_where_the_chip_multiplies_them() -> None:
    found = engine_of("tiny", weights="fp8", num_pages=4).config.activations
    assert found == ("fp8" if multiplies_fp8(torch.device(DEVICE)) else "none")
    assert engine_of("tiny", num_pages=4).config.activations == "none"


@needs_gpu
def test_the_memory_that_plan_assumes() -> None:
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(DEVICE).total_memory
    known = [c for c in GPUS.values() if c.name.split("-")[0] == chip_name(name)]
    if not known:
        pytest.skip(f"{name} is not among {', '.join(GPUS)}")
    assert min(abs(c.memory / total - 1) for c in known) < 0.03, (total, [c.memory for c in known])


@needs_gpu
def test_a_step_that_cannot_be_captured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("tiny", num_pages=8)
    plain = grok_kernels.rms_norm

    def waits(x: torch.Tensor, *args: Any) -> torch.Tensor:
        x.sum().item()
        return plain(x, *args)

    monkeypatch.setattr(grok_kernels, "rms_norm", waits)
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph .* enforce_eager=True runs without"):
        engine.runner.run([Entry([5], 0, [0])])
