from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
MODELS = ("g8-a-emb128-k16", "g1-b-q48-k128", "g8-e-12layers")


class QuantizedWeight8bit:
    """The class that the release's pickles refer to. pickle looks for it in __main__, so it claims to be from there."""

    def __init__(self, weight: Any, scales: Any) -> None:
        self.weight = weight
        self.scales = scales


QuantizedWeight8bit.__module__ = "__main__"
QuantizedWeight8bit.__qualname__ = "QuantizedWeight8bit"


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> type[QuantizedWeight8bit]:
    monkeypatch.setattr(sys.modules["__main__"], "QuantizedWeight8bit", QuantizedWeight8bit, raising=False)
    return QuantizedWeight8bit


@pytest.fixture
def unpickled(quantized: type[QuantizedWeight8bit]) -> Callable[[bytes], tuple[Any, Any]]:
    """Weight and scales as the standard library's pickle reads them, which our reader is compared with."""

    def load(data: bytes) -> tuple[Any, Any]:
        value = pickle.loads(data)
        return (value.weight, value.scales) if isinstance(value, quantized) else (value, None)

    return load


@pytest.fixture(params=MODELS)
def golden(request: pytest.FixtureRequest) -> Path:
    return GOLDENS / request.param


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A copy of the smallest golden checkpoint, to be damaged."""
    target = tmp_path / "model"
    shutil.copytree(GOLDENS / "g1-b-q48-k128", target, ignore=shutil.ignore_patterns("golden.npz"))
    return target
