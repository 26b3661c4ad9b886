"""One engine over the small model, and an app over it, for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grok_engine import AsyncLLM, LLMEngine
from tests.server.calls import TEMPLATE, run

pytest.importorskip("starlette")


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    found = AsyncLLM(LLMEngine("tiny", num_pages=256, max_num_seqs=16))
    yield found
    run(found.close())


@pytest.fixture(scope="module")
def app(llm: AsyncLLM):  # type: ignore[no-untyped-def]
    from grok_engine.server import create_app

    return create_app(llm, chat_template=TEMPLATE)
