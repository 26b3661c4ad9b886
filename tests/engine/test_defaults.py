"""What a person meets first: sampling defaults of a model's files, and sizes that memory holds."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

from grok_engine import LLM, AsyncLLM, CheckpointError, ConfigError, LLMEngine, SamplingParams
from grok_engine.checkpoint.generation import generation_files
from grok_engine.cli import main
from grok_engine.loading.convert import convert
from grok_engine.loading.generation import default_sampling_params

FOLDER = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"


# Sampling defaults


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(FOLDER, target, ignore=shutil.ignore_patterns("golden.npz"))
    return target


def say(folder: Path, values: Any) -> Path:
    (folder / "generation_config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "transformers_version": "5.0", "do_sample": None, "top_p": None}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        (
            {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 7},
            {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "max_tokens": 7},
        ),
        ({"do_sample": False, "temperature": 0.6, "max_new_tokens": 9}, {"temperature": 0, "max_tokens": 9}),
    ],
)
def test_what_a_file_says(folder: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    assert default_sampling_params(say(folder, values)) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 1.5}, r"top_p=1.5 is not a number in \(0, 1\]"),
        ({"temperature": "warm", "top_k": 0.5}, "temperature='warm' is not .*\n.*top_k=0.5 is not an integer"),
        ({"temperature": True}, "temperature=True is not"),
        ({"max_new_tokens": 0}, "max_new_tokens: max_tokens=0 is not an integer"),
        ({"do_sample": "no"}, "do_sample='no' is not true or false"),
        ("[]", "holds a list, expected an object"),
        ('{"temperature": NaN}', "NaN is not a number of JSON"),
        ('{"temperature": 1, "temperature": 2}', "'temperature' stands twice"),
        ('{"top_k": 1' + "0" * 400 + "}", "beyond 64 bits"),
    ],
)
def test_wrong_values_name_the_file(folder: Path, values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json(.|\n)*{message}"):
        LLMEngine(say(folder, values))


def test_calls_without_parameters_take_them(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    say(folder, {"do_sample": False, "max_new_tokens": 3})
    caplog.set_level(logging.INFO, "grok_engine")
    with LLM(folder, dtype="float32") as llm:
        said = [r.getMessage() for r in caplog.records if "sampling defaults" in r.getMessage()]
        assert said == [f"sampling defaults, from {folder / 'generation_config.json'}: max_tokens=3, temperature=0"]
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=3)
        (output,) = llm.generate([5, 6, 7])
        ids = output.outputs[0].token_ids
        assert len(ids) == 3
        assert llm.generate([5, 6, 7])[0].outputs[0].token_ids == ids
        assert [chunk.token_id for chunk in llm.stream([5, 6, 7])] == ids
        (asked,) = llm.generate([5, 6, 7], SamplingParams(seed=1))  # of which nothing comes from the file
        assert (len(asked.outputs[0].token_ids), asked.outputs[0].token_ids[:3] == ids) == (16, False)

    async def collect() -> list[int]:
        async with AsyncLLM(LLMEngine(folder, dtype="float32")) as asynchronous:
            assert asynchronous.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=3)
            return [output.outputs[0].token_ids async for output in asynchronous.generate([5, 6, 7])][-1]

    assert asyncio.run(collect()) == ids
    assert LLMEngine(folder, generation_config="vllm").default_sampling_params == SamplingParams()
    with pytest.raises(ConfigError, match="generation_config='file' is not one of auto, vllm"):
        LLMEngine(folder, generation_config="file")  # type: ignore[arg-type]


def test_the_command_takes_them_where_no_option_is_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*options: str) -> list[str]:
        command = ["generate", "--model", str(folder), "--token-ids", "5,6,7", "--dtype", "float32", *options]
        assert main(command) == 0
        return capsys.readouterr().out.strip().split(",")

    own = tokens("--seed", "1", "--max-tokens", "9")
    assert own == tokens("--seed", "1", "--max-tokens", "9", "--temperature", "0.8", "--top-p", "0.95")
    say(folder, {"do_sample": False, "max_new_tokens": 5})
    greedy = tokens()
    assert (len(greedy), greedy) == (5, tokens("--max-tokens", "9")[:5])
    assert tokens("--max-model-len", "6") == greedy[:3]
    assert tokens("--seed", "1", "--max-tokens", "9", "--temperature", "0.8", "--top-p", "0.95") == own
    say(folder, {"top_k": 1})  # and nothing of a temperature: what the file says is not mixed with numbers of ours
    assert tokens("--max-tokens", "5") == greedy


def test_a_conversion_carries_them(folder: Path, tmp_path: Path) -> None:
    say(folder, {"temperature": 0.25, "top_k": 5})
    out = convert(folder, tmp_path / "converted")
    assert default_sampling_params(out) == SamplingParams(temperature=0.25, top_k=5)


def test_gguf_says_it_in_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("general.sampling.temp", 0.6)
    writer.add_float32("general.sampling.top_p", 0.95)
    writer.add_int32("general.sampling.top_k", 20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expected = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
    assert default_sampling_params(path) == expected
    (tmp_path / "copied").mkdir()
    for name, content in generation_files(path).items():
        (tmp_path / "copied" / name).write_bytes(content)
    assert default_sampling_params(tmp_path / "copied") == expected
