from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grok_engine import LLM, ConfigError, Prompt, SamplingParams, StreamChunk
from tests.engine.spelled import spell

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
FOLDER = GOLDENS / "g8-a-emb128-k16"
VOCAB = 1024
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@cache
def golden() -> dict[str, list[Any]]:
    with np.load(FOLDER / "golden.npz") as arrays:
        return {name: arrays[name].tolist() for name in arrays.files if name.endswith("_tokens")}


PROMPT: list[int] = golden()["p1_tokens"]  # 17 tokens
CONTINUATION: list[int] = golden()["p1_f32_greedy_tokens"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    """A model without a tokenizer."""
    return LLM(FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def eager() -> LLM:
    """The same without recordings: every step calls the modules."""
    return LLM(FOLDER, dtype="float32", enforce_eager=True)


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same model with a tokenizer trained here on meaningless words, with one piece for each token."""
    folder = tmp_path_factory.mktemp("spelling") / "model"
    target = spell(FOLDER, folder, VOCAB, "abcdefghijklmnoprstuvwzäß")
    model = LLM(target, dtype="float32")
    assert model.tokenizer is not None
    assert model.tokenizer.vocab_size == VOCAB
    return model


def tokens(llm: LLM, prompt: Any, params: SamplingParams | None = None) -> list[int]:
    (result,) = llm.generate(prompt, params)
    return result.outputs[0].token_ids


# Prompts


def test_token_ids_alone_and_in_a_list(llm: LLM) -> None:
    other = golden()["p0_tokens"]
    assert tokens(llm, PROMPT, GREEDY) == CONTINUATION
    assert tokens(llm, [PROMPT], GREEDY) == CONTINUATION
    assert tokens(llm, tuple(PROMPT), GREEDY) == CONTINUATION
    results = llm.generate([PROMPT, other, PROMPT], GREEDY)
    assert [r.outputs[0].token_ids for r in results] == [CONTINUATION, golden()["p0_f32_greedy_tokens"], CONTINUATION]
    assert [r.prompt_token_ids for r in results] == [PROMPT, other, PROMPT]
    assert len({r.request_id for r in results}) == 3
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    "array", [np.array, lambda x: np.array(x, np.int32), torch.tensor], ids=["int64", "int32", "t"]
)
def test_arrays_of_token_ids(llm: LLM, array: Any) -> None:
    assert tokens(llm, array(PROMPT), GREEDY) == CONTINUATION
    assert tokens(llm, [array(PROMPT)], GREEDY) == CONTINUATION
    assert tokens(llm, [*array([PROMPT, PROMPT])][:1], GREEDY) == CONTINUATION


def test_a_list_of_numpy_integers(llm: LLM) -> None:
    assert tokens(llm, list(np.array(PROMPT)), GREEDY) == CONTINUATION


def test_result(llm: LLM) -> None:
    (result,) = llm.generate(PROMPT, GREEDY)
    assert result.prompt is None
    assert result.prompt_token_ids == PROMPT
    assert result.finished
    assert len(result.outputs) == 1
    assert result.outputs[0].text == ""  # no tokenizer
    m = result.metrics
    assert 0 < m.arrival <= m.first_token <= m.finished
    assert m.first_token > m.arrival
    with pytest.raises(FrozenInstanceError):
        result.finished = False  # type: ignore[misc]


def test_text_and_mixed_prompts(spelling: LLM) -> None:
    assert spelling.tokenizer is not None
    text = "wort für wort"
    ids = spelling.tokenizer.encode(text)
    one = spelling.generate(text, GREEDY)
    assert (one[0].prompt, one[0].prompt_token_ids) == (text, ids)
    results = spelling.generate([text, PROMPT, ids], GREEDY)
    assert [r.prompt for r in results] == [text, None, None]
    a, b, c = (r.outputs[0] for r in results)
    assert a == c == one[0].outputs[0]
    assert b.token_ids == CONTINUATION
    for output in (a, b):
        assert output.text == spelling.tokenizer.decode(output.token_ids)
        assert output.text


def test_text_without_a_tokenizer(llm: LLM) -> None:
    for call in (llm.generate, llm.stream, llm.encode):
        with pytest.raises(ValueError, match="prompt 'Hello' is text, but the model has no tokenizer: give token ids"):
            call("Hello")
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate([PROMPT, "Hello"])


@pytest.mark.parametrize("token", [-1, VOCAB, 10**12])
def test_a_token_out_of_range(llm: LLM, token: int) -> None:
    for call in (llm.generate, llm.stream, llm.logits):
        with pytest.raises(ValueError, match=rf"token id {token} .*0\.\.{VOCAB - 1}"):
            call([5, token, 7])
    assert llm.logits([0, VOCAB - 1]).shape == (2, VOCAB)


def test_an_empty_prompt(llm: LLM, spelling: LLM) -> None:
    for call in (llm.stream, llm.logits, lambda p: llm.generate([p])):
        with pytest.raises(ValueError, match=r"prompt \[\] is empty"):
            call([])
    with pytest.raises(ValueError, match="prompt '' is empty"):
        spelling.generate("")
    with pytest.raises(ValueError, match="prompt '' is empty"):
        spelling.generate([PROMPT, ""])


def test_nothing_runs_unless_all_prompts_are_valid(llm: LLM, eager: LLM) -> None:
    ran: list[Any] = []
    handle = eager.model.register_forward_hook(lambda *args: ran.append(1))
    try:
        with pytest.raises(ValueError, match=r"prompts\[2\]: token id -5"):
            eager.generate([PROMPT, PROMPT, [3, -5]], GREEDY)
        assert not ran
        eager.generate(PROMPT, GREEDY)
        assert len(ran) == GREEDY.max_tokens  # one step for the prompt, then one for each token but the last
    finally:
        handle.remove()
    assert tokens(llm, PROMPT, GREEDY) == tokens(eager, PROMPT, GREEDY)


# Parameters


def test_a_list_where_one_prompt_is_expected(spelling: LLM) -> None:
    prompts: list[list[Prompt]] = [["a", "b"], [PROMPT], [{"prompt": "a"}]]
    for several in prompts:
        with pytest.raises(ValueError, match=r"expected an integer in 0\.\.1023, and one prompt, not a list of them"):
            spelling.stream(several)  # type: ignore[arg-type]


def test_one_params_or_as_many_as_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    results = llm.generate([PROMPT] * 3, params)
    assert [r.outputs[0].token_ids for r in results] == [CONTINUATION[:n] for n in (1, 5, 3)]
    for wrong in (params[:2], [*params, GREEDY], []):
        with pytest.raises(ValueError, match=f"{len(wrong)} sampling_params for 3 prompts"):
            llm.generate([PROMPT] * 3, wrong)
    assert len(tokens(llm, PROMPT)) <= SamplingParams().max_tokens == 16


# The end

END = CONTINUATION[7]
UNTIL = CONTINUATION[: CONTINUATION.index(END) + 1]


def test_stop_token_ids(llm: LLM) -> None:
    for stops in ((END,), (END, 1023), [END]):
        params = replace(GREEDY, stop_token_ids=stops)
        output = llm.generate(PROMPT, params)[0].outputs[0]
        assert (output.token_ids, output.finish_reason) == (UNTIL, "stop")


def test_stop_on_the_last_token_allowed(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=len(UNTIL), ignore_eos=True, stop_token_ids=(END,))
    assert llm.generate(PROMPT, params)[0].outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("n", [1, 2, 24])
def test_length(llm: LLM, n: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    output = llm.generate(PROMPT, params)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (CONTINUATION[:n], "length")


def test_eos_and_ignore_eos(tmp_path: Path) -> None:
    target = tmp_path / "model"
    shutil.copytree(FOLDER, target, ignore=shutil.ignore_patterns("golden.npz"))
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, "eos_token": END}))
    llm = LLM(target, dtype="float32")
    output = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (UNTIL, "stop")
    output = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (CONTINUATION, "length")


def test_the_end_token_is_not_in_the_text(spelling: LLM) -> None:
    assert spelling.tokenizer is not None
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=(END,))
    output = spelling.generate(PROMPT, params)[0].outputs[0]
    assert output.token_ids == UNTIL
    assert output.text == spelling.tokenizer.decode(UNTIL[:-1])
    assert output.text != spelling.tokenizer.decode(UNTIL)


def test_max_model_len() -> None:
    llm = LLM(FOLDER, dtype="float32", max_model_len=20)
    output = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (CONTINUATION[:3], "length")
    full = PROMPT + CONTINUATION[:3]
    assert llm.logits(full).shape == (20, VOCAB)
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=r"prompt has 20 tokens, all of max_model_len"):
            call(full)
    for call in (llm.generate, llm.stream, llm.logits, llm.encode):
        with pytest.raises(ValueError, match=r"prompt has 21 tokens, expected at most max_model_len=20"):
            call([*full, 5])
    assert len(tokens(llm, full[:-1], GREEDY)) == 1


def test_the_model_s_own_context_bounds_a_request(llm: LLM) -> None:
    assert llm.config.max_model_len == 128
    assert len(tokens(llm, [5] * 126, GREEDY)) == 2
    for length in (0, -3, 129):
        with pytest.raises(ConfigError, match=rf"max_model_len={length} is not an integer in 1\.\.128"):
            LLM(FOLDER, max_model_len=length)


# Sampling


def sampled(seed: int | None, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 2.0, "max_tokens": 12, "ignore_eos": True, "seed": seed, **options})


def test_a_seed_repeats_its_tokens(llm: LLM) -> None:
    first = tokens(llm, PROMPT, sampled(7))
    assert tokens(llm, PROMPT, sampled(7)) == first
    assert len({tuple(tokens(llm, PROMPT, sampled(seed))) for seed in range(6)}) == 6
    # neither other requests of the call nor torch's generator change the tokens
    torch.manual_seed(1)
    torch.rand(5)
    others = llm.generate([golden()["p0_tokens"], PROMPT, PROMPT], [sampled(1), sampled(7), sampled(8)])
    assert others[1].outputs[0].token_ids == first != others[2].outputs[0].token_ids
    assert tokens(llm, PROMPT, sampled(7, max_tokens=5)) == first[:5]


def test_no_seed_is_a_fresh_one(llm: LLM) -> None:
    torch.manual_seed(0)
    first = tokens(llm, PROMPT, sampled(None))
    torch.manual_seed(0)
    assert tokens(llm, PROMPT, sampled(None)) != first


def test_generating_leaves_the_global_generator_alone(llm: LLM) -> None:
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    tokens(llm, PROMPT, sampled(7))
    tokens(llm, PROMPT, sampled(None))
    assert torch.equal(torch.rand(3), wanted)


def test_greedy_has_no_seed(llm: LLM) -> None:
    for seed in (None, 1, 2):
        assert tokens(llm, PROMPT, sampled(seed, temperature=0)) == CONTINUATION[:12]


def test_a_tiny_top_p_is_greedy(llm: LLM) -> None:
    for seed in range(3):
        assert tokens(llm, PROMPT, sampled(seed, top_p=1e-6)) == CONTINUATION[:12]


# Streams


@pytest.mark.parametrize("params", [GREEDY, sampled(3), SamplingParams(temperature=0, max_tokens=1)])
def test_stream_is_generate(spelling: LLM, params: SamplingParams) -> None:
    output = spelling.generate(PROMPT, params)[0].outputs[0]
    chunks = list(spelling.stream(PROMPT, params))
    assert all(isinstance(chunk, StreamChunk) for chunk in chunks)
    assert [chunk.token_id for chunk in chunks] == output.token_ids
    assert "".join(chunk.text for chunk in chunks) == output.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [output.finish_reason]


def test_stream_computes_as_it_is_read(eager: LLM) -> None:
    steps: list[Any] = []
    handle = eager.model.register_forward_hook(lambda *args: steps.append(1))
    try:
        stream = eager.stream(PROMPT, GREEDY)
        assert not steps
        assert next(stream).token_id == CONTINUATION[0]
        assert next(stream).token_id == CONTINUATION[1]
        assert len(steps) == 2
        stream.close()
    finally:
        handle.remove()
    assert tokens(eager, PROMPT, GREEDY) == CONTINUATION


def test_streams_of_two_models_and_of_one_take_turns(llm: LLM) -> None:
    other = LLM(GOLDENS / "g1-b-q48-k128", dtype="float32")
    with np.load(GOLDENS / "g1-b-q48-k128" / "golden.npz") as arrays:
        prompt, wanted = arrays["p1_tokens"].tolist(), arrays["p1_f32_greedy_tokens"].tolist()
    runs: Sequence[tuple[LLM, list[int], list[int]]] = [
        (llm, PROMPT, CONTINUATION),
        (other, prompt, wanted),
        (llm, golden()["p0_tokens"], golden()["p0_f32_greedy_tokens"]),
    ]
    found = list(zip(*(model.stream(p, GREEDY) for model, p, _ in runs), strict=True))
    for i, (_, _, continuation) in enumerate(runs):
        assert [chunks[i].token_id for chunks in found] == continuation


# Logits

LONG: list[int] = golden()["p2_tokens"]  # 33 tokens


@pytest.mark.parametrize("chunk", [1, 2, 7, 32, 33, 1000])
def test_chunks_do_not_matter(llm: LLM, chunk: int) -> None:
    assert torch.equal(llm.logits(LONG, chunk=chunk), llm.logits(LONG))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_pages_do_not_matter(llm: LLM, page_size: int) -> None:
    other = LLM(FOLDER, dtype="float32", page_size=page_size)
    for chunk in (1000, 5):
        assert torch.equal(other.logits(LONG, chunk=chunk), llm.logits(LONG))
    assert tokens(other, PROMPT, GREEDY) == CONTINUATION


def test_logits_are_causal(llm: LLM) -> None:
    assert torch.equal(llm.logits([*LONG[:20], *PROMPT])[:20], llm.logits(LONG)[:20])


@pytest.mark.parametrize("chunk", [0, -1])
def test_bad_chunk(llm: LLM, chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk={chunk} is not a positive integer"):
        llm.logits(PROMPT, chunk=chunk)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_fp32(dtype: Any) -> None:
    logits = LLM(FOLDER, dtype=dtype).logits(PROMPT)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


# Construction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16' is not one of bfloat16, float32"),
        ({"dtype": torch.float16}, "float16.* is not one of bfloat16, float32"),
        ({"weights": "int3"}, "weights='int3' is not one of int8, int8_g128, int4, int4_g128, fp8, bf16, fp32"),
        ({"page_size": 0}, "page_size=0"),
        ({"device": "gpu"}, "device='gpu' cannot be used: "),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used: "),
        pytest.param(
            {"device": "cuda"}, "device='cuda' cannot be used: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here"),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_run_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LLM(FOLDER, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere' is neither a folder nor a \.gguf file"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="model=None is neither text nor a path"):
        LLM(None)  # type: ignore[arg-type]


def test_two_models_live_together(llm: LLM) -> None:
    before = llm.logits(PROMPT)
    other = LLM(FOLDER, dtype="bfloat16", page_size=3, weights="bf16")
    rounded = other.logits(PROMPT)
    assert torch.equal(llm.logits(PROMPT), before)
    assert 0.001 < float((rounded - before).norm() / before.norm()) < 0.1
    for parameter in other.model.parameters():
        parameter.zero_()
    assert torch.equal(llm.logits(PROMPT), before)


# Policy

WATCH = """
import atexit, json, logging, multiprocessing, os, random, signal, sys, threading, warnings
import ml_dtypes, numpy, rich.console, rich.progress, safetensors, sentencepiece, tokenizers, torch

def state():
    return {
        "threads of torch": torch.get_num_threads(),
        "threads between ops": torch.get_num_interop_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch's generator": hash(torch.get_rng_state().numpy().tobytes()),
        "python's generator": hash(random.getstate()),
        "numpy's errors": numpy.geterr(),
        "numpy's printing": str(numpy.get_printoptions()),
        "handlers": [str(h) for h in logging.root.handlers],
        "level": logging.root.level,
        "own handlers": [
            str(h)
            for name, logger in logging.root.manager.loggerDict.items()
            if name.startswith("grok") for h in getattr(logger, "handlers", [])
            if not isinstance(h, logging.NullHandler)
        ],
        "own levels": {
            name: logger.level for name, logger in logging.root.manager.loggerDict.items()
            if name.startswith("grok") and getattr(logger, "level", 0)
        },
        "warnings": str(warnings.filters),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "hooks": [str(sys.excepthook), str(sys.displayhook)],
        "threads": sorted(t.name for t in threading.enumerate()),
        "children": [str(c) for c in multiprocessing.active_children()],
        "atexit": atexit._ncallbacks(),
        "initialised": torch.cuda.is_initialized(),
    }

if os.path.isdir("/proc/self/task"):
    plain = state

    def state():
        children = [open(f"/proc/self/task/{t}/children").read() for t in os.listdir("/proc/self/task")
                    if os.path.exists(f"/proc/self/task/{t}/children")]
        return {**plain(), "child processes": "".join(children)}

before = state()
import grok_engine
after_import = state()
llm = grok_engine.LLM(sys.argv[1])
llm.generate([5, 6, 7], grok_engine.SamplingParams(seed=1, max_tokens=3))
after_use = state()
changed = [{k: [before[k], s[k]] for k in before if before[k] != s[k]} for s in (after_import, after_use)]
print(json.dumps(changed))
"""


def test_importing_and_using_it_sets_no_policy() -> None:
    """Nothing but the module table changes: no process, thread, exit hook, handler, default or random state."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(FOLDER)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{}, {}]


def test_a_stream_that_nobody_reads_leaves_nothing_behind(llm: LLM) -> None:
    before = llm.engine.stats().requests
    stream = llm.stream(PROMPT, GREEDY)
    assert llm.engine.stats().requests == before + 1
    del stream
    assert llm.engine.stats().requests == before


def test_the_inner_folder_stands_for_the_model(llm: LLM) -> None:
    inner = LLM(FOLDER / "ckpt-0", dtype="float32")
    assert inner.config.model == llm.config.model
    assert torch.equal(inner.logits(PROMPT), llm.logits(PROMPT))
