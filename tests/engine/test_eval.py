"""The perplexity of a text: against transformers, against its definition, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grok_engine.sampling.logprobs
from grok_engine import LLM
from grok_engine.cli import main
from grok_engine.layers.weight import FusedWeight, holders
from grok_engine.tools.eval import evaluate, windows
from tests.checkpoint.hf_models import build, tensors_of
from tests.engine.judged import TEXT, perplexity, write_llama

NO_TOKENIZER = str(Path(__file__).parents[1] / "data/goldens/g1-b-q48-k128")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="float32", max_num_batched_tokens=64)


@pytest.mark.parametrize(("context", "stride"), [(64, 32), (50, 7), (48, 48), (64, 9)])
@pytest.mark.parametrize("bos", [True, False])
def test_it_is_that_of_transformers(bos: bool, context: int, stride: int, folder: Path, llm: LLM) -> None:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False).input_ids
    result = evaluate(llm, TEXT, context=context, stride=stride, bos=bos)
    wanted = perplexity(model, [256, *ids] if bos else ids, context, stride)
    assert wanted > 300  # not what an even distribution would give
    assert result.perplexity == pytest.approx(wanted, rel=1e-5)


def test_windows_score_every_token_once() -> None:
    for tokens in (2, 3, 9, 10, 11, 40, 41):
        for context in (2, 5, 10):
            for stride in range(1, context + 1):
                found = windows(tokens, context, stride)
                scored = [i for w in found for i in range(w.scored_from, w.stop)]
                starts = range(0, tokens, context) if stride == context else [0]
                assert scored == [i for i in range(tokens) if i not in starts], (tokens, context, stride)
                assert all(w.stop - w.start <= context and w.scored_from > w.start for w in found)


def test_the_figures_by_their_definitions(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = [256, *llm.tokenizer.encode(TEXT)]
    result = evaluate(llm, TEXT, context=40, stride=20, bos=True)
    assert (result.tokens, result.scored_tokens, result.scored_bytes) == (len(ids), len(ids) - 1, len(TEXT.encode()))
    logprobs_TV = torch.log_softmax(llm.logits(ids[:40]).double(), -1)
    first = -sum(float(logprobs_TV[i, ids[i + 1]]) for i in range(39))
    assert result.window_nats[0] == pytest.approx(first, rel=1e-6)
    nats, tokens = np.array(result.window_nats), np.array(result.window_tokens)
    mean = nats.sum() / tokens.sum()
    assert result.bits_per_byte == pytest.approx(nats.sum() / np.log(2) / len(TEXT.encode()))
    # of a ratio of means: the residuals' standard error over the mean count
    error = np.std(nats - mean * tokens, ddof=1) / np.sqrt(len(nats)) / tokens.mean()
    assert result.standard_error == pytest.approx(error)
    shifted = replace(result, window_nats=tuple(nats + 0.01 * tokens))
    assert shifted.minus(result) == pytest.approx((0.01, 0), abs=1e-9)
    with pytest.raises(ValueError, match="the same text, tokens and windows"):
        result.minus(replace(result, stride=10))


def test_bytes_of_a_part_and_without_bos(llm: LLM) -> None:
    """What is not scored does not count: the first token, and what `limit` leaves out, in the middle of “—” here."""
    assert llm.tokenizer is not None
    cut = len(llm.tokenizer.encode(TEXT.split("—")[0])) + 2
    result = evaluate(llm, TEXT, limit=cut, bos=False)
    assert result.scored_tokens == cut - 1
    assert result.scored_bytes == len(TEXT.split("—")[0].encode()) - 1 + 2
    disjoint = evaluate(llm, "x" * 30, context=10, stride=10, bos=False)
    assert (disjoint.scored_tokens, disjoint.scored_bytes) == (27, 27)


def test_bos_goes_in_front_if_the_files_say_so(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    values = json.loads((folder / "tokenizer.json").read_text())
    special = {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps({**values, "post_processor": template}))
    llm = LLM(folder, dtype="float32")
    assert evaluate(llm, TEXT).bos
    assert evaluate(llm, TEXT).window_nats == evaluate(llm, TEXT, bos=True).window_nats
    assert not evaluate(llm, TEXT, bos=False).bos


def test_a_text_is_scored_in_parts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows of logits are in memory at once; a token beyond the context is scored; the bits are the same."""
    ids = [5, *range(64)]
    wanted = torch.log_softmax(llm.logits(ids[:-1]), -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    rows: list[int] = []
    runner = llm.engine.runner
    monkeypatch.setattr(runner, "logits", lambda x, of=runner.logits: rows.append(len(x)) or of(x))
    monkeypatch.setattr(grok_engine.sampling.logprobs, "PART", 20)
    assert torch.equal(llm.score(ids), wanted)
    assert rows == [20, 20, 20, 4]
    assert torch.equal(llm.score(ids, first=40), wanted[39:])
    assert rows[4:] == [20, 5]
    for first in (0, 65, -1):
        with pytest.raises(ValueError, match=rf"first={first} is not in 1\.\.64"):
            llm.score(ids, first=first)
    with pytest.raises(ValueError, match="max_model_len=64"):
        llm.score([5, *ids])
    with pytest.raises(ValueError, match="262"):
        llm.score([5, 262])


@pytest.mark.parametrize(
    ("arguments", "content", "named"),
    [
        ([], b"", ["is empty"]),
        (["--no-bos"], b"a", ["1 tokens", "at least two"]),
        ([], b"\xff\xfe\x00a", ["not UTF-8", "0xff"]),
        ([], b"abc\0def", ["NUL", "3"]),
        (["--context", "1"], b"some text", ["context=1", "2..max_model_len"]),
        (["--context", "65"], b"some text", ["65", "64"]),
        (["--context", "8", "--stride", "9"], b"some text", ["stride=9", "1..context=8"]),
        (["--stride", "0"], b"some text", ["stride=0"]),
        (["--limit", "1"], b"some text", ["limit=1"]),
        (["--kv", "fp9"], b"some text", ["fp9", "fp8_e4m3"]),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], content: bytes, named: list[str], folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "text").write_bytes(content)
    assert main(["eval", str(folder), "--text", str(tmp_path / "text"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for word in named:
        assert word in captured.err


def test_missing_files_and_tokenizers(tmp_path: Path, folder: Path, capsys: Captured) -> None:
    assert main(["eval", str(folder), "--text", "/no/such"]) == 2
    assert "/no/such" in capsys.readouterr().err
    (tmp_path / "text").write_text("some text")
    assert main(["eval", NO_TOKENIZER, "--text", str(tmp_path / "text")]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_the_command(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "text").write_text(TEXT, newline="")
    command = ["eval", str(folder), "--text", str(tmp_path / "text"), "--dtype", "float32", "--bos"]
    assert main([*command, "--json"]) == 0
    exact = json.loads(capsys.readouterr().out)
    assert (exact["context"], exact["stride"], exact["bos"]) == (64, 32, True)
    assert exact["perplexity"] == pytest.approx(math.exp(exact["nats_per_token"]))
    for options in (
        ["--weights", "int8"], ["--weights", "int8_g128"], ["--head", "int8"], ["--kv", "fp8_e4m3"],
        ["--activations", "int8"],
    ):  # fmt: skip
        assert main([*command, *options, "--json"]) == 0
        rounded = json.loads(capsys.readouterr().out)
        assert 0 < abs(rounded["nats_per_token"] - exact["nats_per_token"]) < 0.2, options
    assert main(command) == 0
    text = capsys.readouterr().out
    for figure in (f"{exact['perplexity']:.4f}", f"{exact['bits_per_byte']:.5f}", "64 tokens, one every 32", "BOS"):
        assert figure in text


def test_int8_g128_has_a_scale_per_128_columns_at_most(tmp_path: Path) -> None:
    """192 columns are two groups of 96, 384 three of 128, and each is rounded by its own largest value."""
    build("Llama", hidden_size=192, intermediate_size=384).save_pretrained(tmp_path)
    model = LLM(tmp_path, dtype="float32", weights="int8_g128").model
    stored = tensors_of(tmp_path)["model.layers.1.mlp.down_proj.weight"].float()
    groups = {
        path: m.weight.scales.shape[1] for path, m in holders(model) if path != "embed" and isinstance(m, FusedWeight)
    }
    assert {path.split(".")[-1]: n for path, n in groups.items()} == {"qkv": 2, "o": 2, "w13": 2, "w2": 3, "lm_head": 2}
    weight = model.layers[1].feed_forward.w2.weight.with_layout("rows")
    grouped = stored.unflatten(1, (3, 128))
    scales = grouped.abs().amax(2, keepdim=True) / 127
    assert weight.scales is not None
    assert torch.equal(weight.scales[0].t(), scales[:, :, 0])
    assert torch.equal(weight.values[0], (grouped / scales).round().flatten(1).to(torch.int8))
