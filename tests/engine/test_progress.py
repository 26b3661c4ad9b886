"""Progress bars: drawn on a terminal, silent elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from grok_engine import LLM
from grok_engine.progress import byte_bar, request_bar
from tests.engine.serving import FOLDER


def stand_in(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    text = io.StringIO()
    text.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", text)
    monkeypatch.setenv("TERM", "xterm")
    return text


def test_a_terminal_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    text = stand_in(monkeypatch, terminal=True)
    with byte_bar("loading") as progress:
        progress(5_000_000, 10_000_000)
    assert "loading" in text.getvalue()
    assert "5.0/10.0 MB" in text.getvalue()
    with request_bar(7) as progress:
        assert "0/7 requests" in text.getvalue()
        progress(3, 7)
    assert "3/7 requests" in text.getvalue()
    assert "None" not in text.getvalue()


def test_nothing_is_written_elsewhere_or_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    text = stand_in(monkeypatch, terminal=False)
    with byte_bar("loading") as loaded, request_bar(7) as finished:
        loaded(5, 10)
        finished(3, 7)
    assert text.getvalue() == ""
    text = stand_in(monkeypatch, terminal=True)
    with byte_bar("loading", shown=False) as loaded, request_bar(7, shown=False) as finished:
        loaded(5, 10)
        finished(3, 7)
    assert text.getvalue() == ""
    llm = LLM(FOLDER, dtype="float32", num_pages=8)
    text.truncate(0)
    llm.generate([5, 6], use_tqdm=False)
    assert text.getvalue() == ""
    llm.generate([5, 6])
    assert "0/1 requests" in text.getvalue()
    monkeypatch.setattr(sys, "stderr", None)  # as a windowed program has it
    with byte_bar("loading") as loaded:
        loaded(5, 10)
