"""The benchmark of a whole model beside llama.cpp runs to its end at a tiny size. No time is looked at."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import grok_kernels
from grok_engine import ModelConfig
from grok_engine.checkpoint.xai.layout import layout

STATUS = grok_kernels.backends()["rms_norm"]["cpu"]
if not STATUS.available:
    pytest.skip(STATUS.reason, allow_module_level=True)

import benchmarks.cpu_model.__main__ as whole_model  # noqa: E402
from benchmarks.bench_step_share import random_tensors  # noqa: E402
from benchmarks.cpu_model import engines, gguf_grok  # noqa: E402


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_model_runs_without_llama_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "found.json"
    assert whole_model.main(["--smoke", "--threads", "1", "--json", str(file)]) == 0
    assert "missing (llama.cpp)" in (out := capsys.readouterr().out)
    assert "llama-cpp-python" in out
    assert "grok-engine[bench]" in out
    turns = json.loads(file.read_text())["turns"]
    assert list(turns) == ["grok-engine, int8", "grok-engine, int8, int8 rows"]
    assert all(value > 0 for name in turns for value in turns[name][0].values())
    assert whole_model.main(["--smoke", "--short", "--rounds", "2", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 request, 2 rounds, reading at" in out
    assert re.search(
        r"grok-engine, int8: [\d.]+ decode tok/s; grok-engine, int8 is 1\.00 times as fast \(95% 1",
        " ".join(out.split()),
    )
    with pytest.raises(SystemExit):
        whole_model.main(["--smoke", "--llama", str(tmp_path)])
    assert "found no llama-batched-bench, llama-quantize" in capsys.readouterr().err


def test_llama_is_found_on_the_path_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "llama_cpp" else None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert engines.find_llama(None) == engines.Tools(None)
    for tool in engines.TOOLS:
        (tmp_path / tool).touch(mode=0o755)
    assert engines.find_llama(None) == engines.find_llama(tmp_path) == engines.Tools(tmp_path)
    command = engines.Tools(None).bench(tmp_path / "model", engines.Load(2, 3, 4))
    assert command[1:4] == ["-m", "benchmarks.cpu_model.llama_python", "bench"]
    assert command[-3:] == ["2", "3", "4"]


def test_the_package_of_llama_computes_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    file = tmp_path / "found.json"
    assert whole_model.main(["--smoke", "--threads", "1", "--kinds", "Q8_0", "--json", str(file)]) == 0
    turn = json.loads(file.read_text())["turns"]["llama.cpp, Q8_0"][0]
    assert all(value > 0 for value in turn.values())


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
    config: ModelConfig = whole_model.small_configuration()
    whole_model.write_models(tmp_path, config, None, ())
    whole_model.write_models(tmp_path, config, None, ())
    with pytest.raises(ValueError, match="holds another model"):
        whole_model.write_models(tmp_path, replace(config, num_layers=3), None, ())
