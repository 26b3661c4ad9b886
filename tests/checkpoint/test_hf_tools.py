"""What people do with a folder of the hub besides running it: name it, plan it, convert it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grok_engine import LLM, CheckpointError, ConfigError, read_config
from grok_engine.cli import main
from grok_engine.loading.convert import convert
from grok_engine.loading.resolve import resolve_model
from tests.checkpoint.hf_models import config_of, configure, error

DATA = Path(__file__).parents[1] / "data" / "hf"
NAMES = ("grok2-a", "llama-a", "mistral-a", "mixtral-a")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one model, its snapshot made of links."""
    root = tmp_path / "models--some-org--llama-a"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abcd")
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted((DATA / "llama-a").iterdir())):
        shutil.copy(file, root / "blobs" / str(i))
        (snapshot / file.name).symlink_to(root / "blobs" / str(i))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_a_model_by_its_name_on_the_hub(cache: Path) -> None:
    llm = LLM("some-org/llama-a", dtype="float32")
    assert llm.config.model.name == "some-org/llama-a"
    golden = np.load(DATA / "llama-a" / "golden.npz")
    assert error(llm.logits(golden["tokens"].tolist()), golden["logits"]) <= 2e-5
    assert resolve_model(cache) == resolve_model(cache.parents[1]) == cache


@pytest.mark.parametrize(
    ("ref", "message"), [("dead", "names 'dead', which is not in"), ("../..", "names"), (None, "there is no refs/main")]
)
def test_a_folder_of_the_cache_without_its_snapshot(cache: Path, ref: str | None, message: str) -> None:
    root = cache.parents[1]
    (root / "refs" / "main").unlink()
    if ref is not None:
        (root / "refs" / "main").write_text(ref)
    with pytest.raises(ConfigError, match=f"{message}.*: expected the path of a snapshot"):
        LLM(root)


def test_a_name_that_is_not_in_the_cache_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"nor in the hub's cache: `hf download some-org/other` .*nothing is downloaded"
    ):
        LLM("some-org/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface_hub"):
        LLM("some-org/llama-a")


def test_generation_config_adds_tokens_that_end_an_answer(tmp_path: Path) -> None:
    configure(tmp_path, config_of(DATA / "llama-a"))
    for found, expected in ((None, (2,)), (7, (2, 7)), ([2, 9, 4], (2, 9, 4))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
        assert read_config(tmp_path).eos_token_ids == expected
    for wrong in ("x", [["x"]], [400], True, 1.5):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id="):
            read_config(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_converted_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    folder = convert(DATA / name, tmp_path / "packed", dtype="float32")
    before, after = (LLM(path, dtype="float32") for path in (DATA / name, folder))
    a, b = (llm.config.model.to_dict() for llm in (before, after))
    assert a == b
    assert torch.equal(before.logits([5, 9, 200, 3, 3]), after.logits([5, 9, 200, 3, 3]))


def test_a_rotary_scaling_survives_conversion(tmp_path: Path) -> None:
    shutil.copytree(DATA / "llama-a", tmp_path / "model")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    values = {**config_of(DATA / "llama-a"), "rope_parameters": {**rope, "original_max_position_embeddings": 64}}
    configure(tmp_path / "model", values)
    config = read_config(convert(tmp_path / "model", tmp_path / "packed"))
    assert config.rope_factors == read_config(tmp_path / "model").rope_factors
    assert config.rope_factors[-1] == 8.0


@pytest.mark.parametrize("name", NAMES)
def test_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DATA / name), "--gpus", "1", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["model"], planned["params_total"]) == (name, read_config(DATA / name).param_count())


def test_a_wrong_folder_is_one_line_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(tmp_path, {"architectures": ["GPT2LMHeadModel"]})
    for command in (["generate", "--token-ids", "1", "--model"], ["plan"], ["inspect"]):
        assert main([*command, str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "GPT2LMHeadModel" in line
