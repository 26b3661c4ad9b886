"""The benchmark of a whole model beside llama.cpp runs to its end at a tiny size. No time is looked at."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import grok_kernels
from grok_bench.schema import load
from grok_engine.checkpoint.xai.layout import layout

STATUS = grok_kernels.backends()["rms_norm"]["cpu"]
if not STATUS.available:
    pytest.skip(STATUS.reason, allow_module_level=True)

import benchmarks.cpu_model.__main__ as whole_model  # noqa: E402
from benchmarks.cpu_model import gguf_grok  # noqa: E402
from benchmarks.model_1b import random_tensors  # noqa: E402

PROBLEMS = ["prefill/t16", "decode/b1", "decode/b2", "first-token"]


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


def test_gguf_holds_the_same_model(tmp_path: Path) -> None:
    config = whole_model.small_configuration()
    assert len({gguf_grok.gguf_name(spec.name) for spec in layout(config)}) == len(layout(config))
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    gguf_grok.write_gguf(path, config, random_tensors(config))
    reader = gguf.GGUFReader(path)
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GROK]}
    tensors = {t.name: t for t in reader.tensors}
    assert {".".join(p for p in name.split(".")[:-1]) for name in tensors} <= {
        name.format(bid=layer) for name in known for layer in range(config.num_layers)
    }
    for name, (weight, scales) in random_tensors(config):
        stored = tensors[gguf_grok.gguf_name(name)]
        got = gguf.quants.dequantize(stored.data, stored.tensor_type)
        exact = weight.astype(np.float32) * (1 if scales is None else scales.astype(np.float32))
        expected = exact if name == "embed" or exact.ndim == 1 else exact.swapaxes(-1, -2)
        np.testing.assert_allclose(got, expected, rtol=2**-8)


def test_a_folder_with_another_model_is_refused(tmp_path: Path) -> None:
    config = whole_model.small_configuration()
    whole_model.write_models(tmp_path, config, ())
    whole_model.write_models(tmp_path, config, ())
    with pytest.raises(ValueError, match="holds another model"):
        whole_model.write_models(tmp_path, replace(config, num_layers=3), ())
