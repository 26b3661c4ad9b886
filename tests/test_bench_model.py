"""The benchmark of a whole model beside llama.cpp runs to its end at a tiny size. No time is looked at."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grok_kernels
from grok_bench.schema import load

STATUS = grok_kernels.backends()["rms_norm"]["cpu"]
if not STATUS.available:
    pytest.skip(STATUS.reason, allow_module_level=True)

import benchmarks.cpu_model.__main__ as whole_model  # noqa: E402
from benchmarks import bench_step_share  # noqa: E402
from benchmarks.model_1b import write  # noqa: E402

PROBLEMS = ["prefill/t16", "decode/b1", "decode/b2"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_model_runs_without_llama_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "found.json"
    assert whole_model.main(["--smoke", "--threads", "1", "--json", str(file)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "llama.cpp is not installed: pip install llama-cpp-python '.[bench]'" in out
    assert "tokens/s" in out
    results = load(file).kernels
    assert [r.problem.removeprefix("model/grok-1.30b/") for r in results] == PROBLEMS
    for r in results:
        timed = [s.contestant for s in r.scores if s.seconds]
        assert timed[0] == "grok-engine, int8"
        assert len(timed) == 2
        assert r.rounds == 1


def test_llama_computes_the_same_work(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    file = tmp_path / "found.json"
    assert whole_model.main(["--smoke", "--threads", "1", "--kinds", "Q8_0", "--json", str(file)]) == 0
    results = load(file).kernels
    assert [r.best_peer for r in results] == ["llama.cpp, Q8_0"] * len(PROBLEMS)
    assert all(s.seconds and s.seconds > 0 for r in results for s in r.scores)


def test_a_folder_with_another_model_is_refused(tmp_path: Path) -> None:
    config = whole_model.small_configuration()
    whole_model.write_models(tmp_path, config, ())
    whole_model.write_models(tmp_path, config, ())
    with pytest.raises(ValueError, match="holds another model"):
        whole_model.write_models(tmp_path, replace(config, num_layers=3), ())


def test_a_decode_step_is_taken_apart(tmp_path: Path) -> None:
    write(tmp_path, whole_model.small_configuration())
    for eager in (False, True):
        spent = bench_step_share.measure(tmp_path, requests=2, steps=3, eager=eager)
        assert {"moe", "paged_attention", "grouped_gemm"} <= spent.keys()
        assert 0 < spent["rest"] < spent["whole"]
        assert all(0 < spent[part] < spent["whole"] for part in bench_step_share.PARTS)
