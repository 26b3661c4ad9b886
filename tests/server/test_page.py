"""The page at `/` in a headless Chromium, over a socket, as somebody uses it; and the numbers that it shows."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from grok_engine import AsyncLLM, LLMEngine, SamplingParams
from grok_engine.server import create_app
from tests.server.browser import Browser, find
from tests.server.calls import TEMPLATE, ask, run

PROGRAM = find()
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt install chromium-headless-shell")
SIZES = [("light", 1280, 800, False), ("dark", 1280, 800, True), ("narrow", 390, 844, True)]
# WCAG's contrast of two colours that CSS gives as rgb(…)
CONTRAST = """((a, b) => {
  const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const [x, y] = [light(a), light(b)];
  return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
})"""


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    found = AsyncLLM(LLMEngine("tiny", num_pages=256, expert_load=True))
    yield found
    run(found.close())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The app's address while it is served."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


def said(llm: AsyncLLM, prompt: Any, tokens: int) -> str:
    """What the model answers by itself."""

    async def generate() -> str:
        outputs = llm.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0))
        text = [output.outputs[0].text async for output in outputs][-1]
        return text

    return str(run(generate()))


def say(browser: Browser, text: str) -> None:
    browser.type("#text", text)
    browser.press_enter()
    browser.wait("document.querySelectorAll('.note').length === document.querySelectorAll('.answer').length && !stop")


def prepare(browser: Browser, url: str, tokens: int, **screen: Any) -> None:
    browser.errors.clear()
    browser.requests.clear()
    browser.open(url, **screen)
    browser.wait("document.querySelector('#state').textContent === 'running'")
    browser.run(f"$('tokens').value = {tokens}; $('temperature').value = 0")


@needs_browser
@pytest.mark.parametrize(("name", "width", "height", "dark"), SIZES, ids=[size[0] for size in SIZES])
def test_a_text_is_continued_and_the_engine_shown(
    llm: AsyncLLM, browser: Browser, tmp_path: Path, name: str, width: int, height: int, dark: bool
) -> None:
    prompt = "To Sherlock Holmes she is always"
    with served(create_app(llm, served_model_name="a-model/of-a-very-long-name-that-no-phone-has-room-for")) as url:
        prepare(browser, url, 24, width=width, height=height, dark=dark)
        say(browser, prompt)
        assert browser.run("document.querySelector('.answer .given').textContent") == prompt
        assert browser.run("document.querySelector('.answer .text').textContent") == said(llm, prompt, 24)
        assert re.match(r"first after [\d.]+ s · 24 tokens · [\d.]+ tokens/s · length", browser.run(
            "document.querySelector('.note').textContent"))  # fmt: skip
        stats = llm.stats()
        finished = stats.finished["length"] + stats.finished["stop"]
        if name == "narrow":
            assert not browser.run("$('engine').open"), "the conversation has the screen"
            browser.click("summary")
        browser.wait(f"$('finished').textContent === '{finished}' && !$('experts').hidden")
        assert browser.run("$('running').textContent") == "0 of 64"
        assert browser.run("$('pages').textContent") == "0 of 256"
        # a column a layer, a row an expert
        assert browser.run("[$('load').width, $('load').height]") == [4, 8]
        assert re.match(r"Busiest: expert \d of layer \d, \d\.\d × the mean\.", browser.run("$('busiest').textContent"))
        # nothing is cut off, and everything can be read
        for selector in ("#state", "#text", "#send", "#load", ".note"):
            box = browser.run(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
            assert 0 <= box["left"] <= box["right"] <= width, (name, selector, box)
        assert browser.run("innerWidth") == width
        assert browser.run("$('send').getBoundingClientRect().bottom") <= height
        for selector, behind in (("#text", "#text"), (".note", "body"), ("dt", "aside"), ("#send", "#send")):
            of = [f"getComputedStyle(document.querySelector('{s}'))" for s in (selector, behind)]
            contrast = browser.run(f"{CONTRAST}({of[0]}.color, {of[1]}.backgroundColor)")
            assert contrast >= 4.5, (name, selector, contrast)
        shade = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", shade))) < 3 * 64) == dark
        assert browser.errors == []
        assert set(browser.requests) == {url, f"{url}stats", f"{url}v1/completions"}, "nothing from elsewhere"


@needs_browser
def test_a_conversation_under_a_prefix_behind_a_key(llm: AsyncLLM, browser: Browser) -> None:
    app = create_app(llm, api_key="secret", chat_template=TEMPLATE, served_model_name="m")
    with served(Starlette(routes=[Mount("/llm", app)])) as url:
        browser.open(f"{url}llm")
        browser.wait("document.querySelector('#state').textContent === 'API key needed'")
        assert browser.run("getComputedStyle($('keyed')).display") != "none"
        browser.type("#key", "secret")
        browser.wait("document.querySelector('#state').textContent === 'running'")
        assert browser.run("$('mode').value") == "chat", "the app has a template"
        browser.run("$('tokens').value = 12; $('temperature').value = 0")
        talk = [{"role": "user", "content": "Good <b>morning</b>, Watson."}]
        for question in ("Good <b>morning</b>, Watson.", "And then?"):
            talk = talk if question == talk[-1]["content"] else [*talk, {"role": "user", "content": question}]
            say(browser, question)
            answer = said(llm, llm.apply_chat_template(talk, chat_template=TEMPLATE), 12)
            found = browser.run("[...document.querySelectorAll('.user, .answer .text')].map((e) => e.textContent)")
            talk.append({"role": "assistant", "content": answer})
            assert found == [message["content"] for message in talk]
        assert browser.run("document.querySelectorAll('#log b').length") == 0
        browser.click("#clear")
        assert browser.run("document.querySelector('#log').textContent") == ""
        assert browser.run("messages.length") == 0


@needs_browser
def test_an_answer_can_be_stopped_and_an_error_is_shown(llm: AsyncLLM, browser: Browser) -> None:
    with served(create_app(llm)) as url:
        prepare(browser, url, 2000)
        browser.type("#text", "x")
        browser.press_enter()
        browser.wait("document.querySelector('.answer .text')?.textContent.length > 20")
        assert browser.run("$('running').textContent").endswith(" of 64")
        browser.click("#send")  # it says Stop
        browser.wait("!stop")
        assert browser.run("document.querySelector('.note').textContent").endswith("stopped")
        run(freed(llm))
        browser.type("#text", "y " * 5000)
        browser.press_enter()
        browser.wait("document.querySelector('.error') !== null")
        assert "max_model_len=" in browser.run("document.querySelector('.error').textContent")


async def freed(llm: AsyncLLM) -> None:
    while llm.stats().scheduler.pages_used:
        await asyncio.sleep(0.01)


def test_the_numbers_are_the_engines(llm: AsyncLLM) -> None:
    said(llm, "My dear Watson", 8)
    app = create_app(llm, served_model_name="m")
    found, stats = ask(app, "GET", "/stats").json(), llm.stats()
    s = stats.scheduler
    assert found.pop("seconds") > 0
    assert found == {
        "model": "m", "state": "running", "chat": False, "running": 0, "waiting": 0, "max_running": 64,
        "pages": {"used": 0, "free": 256, "cached": s.pages_cached, "tokens": 16}, "kv_bytes": stats.kv_bytes,
        "steps": stats.steps, "preemptions": 0, "finished": stats.finished, "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "prefix_tokens": {"queried": s.query_tokens, "found": s.hit_tokens}, "expert_load": stats.expert_load,
    }  # fmt: skip

    async def asleep() -> Any:
        async with AsyncLLM(LLMEngine("tiny", num_pages=16)) as other:
            app = create_app(other)
            await other.sleep()
            return await asyncio.to_thread(lambda: ask(app, "GET", "/stats").json())

    assert run(asleep())["state"] == "asleep"


def test_the_page_is_one_file_that_loads_nothing(llm: AsyncLLM) -> None:
    response = ask(create_app(llm), "GET", "/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http:" not in response.text
    assert "https:" not in response.text
    assert len(response.text.splitlines()) < 300
    assert max(map(len, response.text.splitlines())) <= 120
    assert ask(create_app(llm, page=False), "GET", "/").status_code == 404
