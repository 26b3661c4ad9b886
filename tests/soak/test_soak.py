"""A short soak, and that it finds what is wrong: each fault is one that an engine has had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from grok_engine.runtime.allocator import PageAllocator
from grok_engine.runtime.turn import Turn
from grok_engine.sampling.state import SamplingState

from .__main__ import main


def test_a_round() -> None:
    assert main(["--seed", "3", "--repeat", "1", "--runs", "4"]) == 0


def abort_within_a_step(patch: pytest.MonkeyPatch) -> None:
    def ask(self: Turn, change: Callable[[Any], None], argument: Any) -> None:
        change(argument)

    patch.setattr(Turn, "ask", ask)


def keep_a_page(patch: pytest.MonkeyPatch) -> None:
    plain = PageAllocator.release
    patch.setattr(PageAllocator, "release", lambda self, pages: plain(self, pages[: 1 if len(pages) == 2 else None]))


def draw_by_the_batch(patch: pytest.MonkeyPatch) -> None:
    plain, drawn = SamplingState.uniform, [0]

    def uniform(self: SamplingState) -> float:
        drawn[0] += 1
        return plain(self) * (1 - 1e-3 * (drawn[0] % 3))

    patch.setattr(SamplingState, "uniform", uniform)


@pytest.mark.parametrize("plant", [abort_within_a_step, keep_a_page, draw_by_the_batch])
def test_a_fault_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch)
    assert main(["--seed", "8", "--repeat", "5", "--runs", "4"]) == 1
    assert "python -m tests.soak --seed 8 --repeat" in capsys.readouterr().out
