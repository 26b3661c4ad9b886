"""Clients that leave, read slowly, or come when there is no room; failures; and mounting."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp

from grok_engine import AsyncLLM, LLMEngine, RequestOutput
from grok_engine.server import Limits, create_app
from tests.server.calls import Exchange, ask, data_of, events, idle, post, refusal, run

PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "My dear Watson", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


class Steps:
    """Lets an engine step so often, and no more."""

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allowed, self._step, self._over = threading.Semaphore(0), engine.step, False
        self.running = threading.Lock()
        monkeypatch.setattr(engine, "step", self._wait)

    def _wait(self) -> list[RequestOutput]:
        with self.running:
            if not self._over:
                assert self._allowed.acquire(timeout=20)
            return self._step()

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)

    def free(self) -> None:
        self._over = True
        self.allow(1)


@pytest.fixture
def steps(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    found = Steps(llm.engine, monkeypatch)
    yield found
    found.free()
    run(idle(llm))
    with found.running:  # a step that is still ending would count among the next test's
        pass


@pytest.mark.parametrize("body", [{"stream": True}, {}, {"prompt": ["a", "b", "c"], "stream": True}, {"n": 3}])
def test_a_client_that_leaves_frees_its_pages_before_the_next_step(
    app: ASGIApp, llm: AsyncLLM, steps: Steps, body: dict[str, Any]
) -> None:
    async def leave() -> None:
        exchange = Exchange(app, PATH, {**LONG, **body})
        before = llm.stats().steps
        serving = asyncio.ensure_future(exchange.run())
        steps.allow(5)
        while llm.stats().steps < before + 5:
            await asyncio.sleep(0.001)
        assert llm.stats().scheduler.pages_used
        exchange.leave()
        await serving
        while llm.stats().scheduler.pages_used:  # the fifth step may still be ending; there is no sixth
            await asyncio.sleep(0.001)
        assert (llm.stats().requests, llm.stats().steps) == (0, before + 5)
        if not body.get("stream"):
            assert exchange.sent == []
        assert len(asyncio.all_tasks()) == 1 + 1  # this one, and what bounds its time

    run(leave())


def test_each_event_comes_with_its_step(app: ASGIApp, steps: Steps) -> None:
    async def stream() -> Exchange:
        exchange = Exchange(app, PATH, {**LONG, "prompt": [770], "max_tokens": 7, "stream": True})

        async def ask_for_one(message: Any) -> None:
            steps.allow(1)  # the next token is computed once this one is sent

        exchange.on_send = ask_for_one
        await exchange.run()
        return exchange

    whole = run(stream())
    assert len([message for message in whole.sent if message.get("body", b"").startswith(b"data: {")]) == 7


def test_a_client_that_left_is_logged_as_such(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    async def leave() -> None:
        exchange = Exchange(app, PATH, LONG)
        exchange.leave()
        await exchange.run()

    with caplog.at_level("INFO", "grok_engine.server"):
        run(leave())
    assert f"POST {PATH} 499 " in caplog.text


def test_what_a_slow_reader_missed_comes_in_one_piece(app: ASGIApp, llm: AsyncLLM) -> None:
    body = {**LONG, "max_tokens": 100}

    async def read_slowly(prompts: Any) -> Exchange:
        exchange = Exchange(app, PATH, {**body, "prompt": prompts, "stream": True})
        readable = asyncio.Event()

        async def wait(message: dict[str, Any]) -> None:
            if message.get("body"):
                await readable.wait()

        exchange.on_send = wait
        serving = asyncio.ensure_future(exchange.run())
        while len(exchange.sent) < 2:
            await asyncio.sleep(0.001)
        await idle(llm)  # the engine does not wait for the reader
        assert len(exchange.sent) == 2
        readable.set()
        await serving
        return exchange

    for prompts in ("My dear Watson", ["My dear Watson", "The President"]):
        whole = [choice["text"] for choice in post(app, PATH, {**body, "prompt": prompts})["choices"]]
        exchange = run(read_slowly(prompts))
        assert len(exchange.sent) <= 2 + 3 * len(whole)  # not one for each token
        read = [""] * len(whole)
        for data in data_of(exchange.text)[:-1]:
            for choice in json.loads(data)["choices"]:
                read[choice["index"]] += choice["text"]
        assert read == whole


def test_a_silent_stream_sends_comments(llm: AsyncLLM, steps: Steps) -> None:
    app = create_app(llm, limits=Limits(keep_alive_seconds=0.05))

    async def stream() -> Exchange:
        exchange = Exchange(app, PATH, {**LONG, "max_tokens": 4, "stream": True})
        serving = asyncio.ensure_future(exchange.run())
        await asyncio.sleep(0.4)
        steps.free()
        await serving
        return exchange

    parts = [message["body"] for message in run(stream()).sent[1:]]
    assert parts[0] == b": keep-alive\n\n"
    assert {part[:7] for part in parts} == {b": keep-", b"data: {", b"data: ["}
    assert parts[-1].endswith(b"data: [DONE]\n\n")


def test_a_full_queue_is_429_and_its_streams_get_no_200() -> None:
    llm = AsyncLLM(LLMEngine("tiny", num_pages=16, max_waiting=2))
    app = create_app(llm)
    go, step = threading.Event(), llm.engine.step
    llm.engine.step = lambda: go.wait(20) and step()  # type: ignore[assignment,return-value,method-assign]

    async def crowd() -> None:
        first = [Exchange(app, PATH, {"prompt": "a", "max_tokens": 2}) for _ in range(2)]
        serving = [asyncio.ensure_future(exchange.run()) for exchange in first]
        while llm.engine.num_waiting < 2:
            await asyncio.sleep(0.001)
        for more in ({}, {"stream": True}, {"prompt": ["a", "b"]}):
            exchange = Exchange(app, PATH, {"prompt": "a", "max_tokens": 2, **more})
            await exchange.run()
            assert exchange.status == 429
            assert (b"retry-after", b"1") in [(k.lower(), v) for k, v in exchange.sent[0]["headers"]]
            error = json.loads(exchange.text)["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert "max_waiting=2" in error["message"]
        go.set()
        await asyncio.gather(*serving)
        assert [exchange.status for exchange in first] == [200, 200]
        await llm.close()

    run(crowd())


def test_a_step_that_fails_is_500_or_an_event(
    app: ASGIApp, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = llm.engine.runner.forward

    def fail(plan: Any, *routed: Any) -> Any:
        if any(entry.start >= 20 for entry in plan.entries):
            raise RuntimeError("planted")
        return forward(plan, *routed)

    monkeypatch.setattr(llm.engine.runner, "forward", fail)
    error = refusal(app, PATH, LONG, 500)
    assert (error["type"], error["code"]) == ("server_error", "generation_failed")
    assert "planted" in error["message"]
    *others, last = events(app, PATH, LONG)
    assert others
    assert last == {"error": error}
    monkeypatch.undo()
    assert llm.stats().scheduler.pages_used == 0
    post(app, PATH, {**LONG, "max_tokens": 1})


def test_a_fault_of_the_server_says_nothing_of_it(
    app: ASGIApp, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(llm, "generate", fail)
    error = refusal(app, PATH, LONG, 500)
    assert (error["type"], "secret" in error["message"]) == ("server_error", False)
    assert "secret" in caplog.text


@pytest.mark.parametrize("over_its_time", [True, False])
def test_a_request_that_is_aborted_is_an_error(llm: AsyncLLM, steps: Steps, over_its_time: bool) -> None:
    """By its deadline, or by the program: never an answer that looks whole. A stream has what came before."""
    app = create_app(llm, limits=Limits(request_seconds=1.0 if over_its_time else None))
    body = {**LONG, "prompt": [770]}

    async def both() -> list[Exchange]:
        whole, stream = Exchange(app, PATH, body), Exchange(app, PATH, {**body, "stream": True})
        serving = [asyncio.ensure_future(exchange.run()) for exchange in (whole, stream)]
        while not text_so_far(stream) or llm.stats().requests < 2:  # the second may join late
            steps.allow(1)
            await asyncio.sleep(0.01)
        if over_its_time:
            await asyncio.sleep(1.1)
        else:
            for mailbox in llm._stepper.all():
                llm.abort(mailbox.request_id)
        steps.free()
        await asyncio.gather(*serving)
        return [whole, stream]

    whole, stream = run(both())
    status, code = (504, "timeout") if over_its_time else (503, "unavailable")
    assert whole.status == status
    assert ((b"x-should-retry", b"false") in whole.sent[0]["headers"]) == over_its_time
    error = json.loads(whole.text)["error"]
    assert (error["code"], error["type"]) == (code, "server_error")
    *some, last, done = data_of(stream.text)
    assert (done, json.loads(last)) == ("[DONE]", {"error": error})
    assert {json.loads(data)["choices"][0]["finish_reason"] for data in some} == {None}


def text_so_far(stream: Exchange) -> str:
    events = [json.loads(data) for data in data_of(stream.text)]
    return "".join(event["choices"][0]["text"] for event in events)


def test_long_bodies_do_not_hold_up_the_event_loop(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their prompts are encoded on another thread, many are queued there, and short ones at once."""
    threads = []
    generate = llm.generate

    def watch(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return generate(*args, **options)

    monkeypatch.setattr(llm, "generate", watch)
    app = create_app(llm, limits=Limits(inline_bytes=100))
    for prompt in ("a", "a " * 200):
        whole = post(app, PATH, {"prompt": prompt, "max_tokens": 4, "temperature": 0})["choices"][0]["text"]
        pieces = events(app, PATH, {"prompt": prompt, "max_tokens": 4, "temperature": 0})
        assert "".join(event["choices"][0]["text"] for event in pieces) == whole
    post(app, PATH, {"prompt": "a", "n": 17, "max_tokens": 1})
    assert threads == [True, True, False, False, False]


def test_mounted_in_a_program_of_its_users(app: ASGIApp, llm: AsyncLLM) -> None:
    """Under a prefix, twice, on their event loop, without a lifespan; their own routes and errors stay theirs."""
    theirs = FastAPI()
    theirs.mount("/a", app)
    theirs.mount("/b/c", create_app(llm, served_model_name="other", api_key="key"))

    @theirs.get("/own")
    async def own() -> dict[str, int]:
        return {"pages": llm.stats().scheduler.pages_used}

    body = {"prompt": "a", "max_tokens": 2}
    assert post(theirs, "/a/v1/completions", body)["model"] == "tiny"
    assert post(theirs, "/b/c/v1/completions", body, headers={"authorization": "Bearer key"})["model"] == "other"
    refusal(theirs, "/b/c/v1/completions", body, 401)
    assert ask(theirs, "GET", "/b/c/health").status_code == 200
    assert ask(theirs, "GET", "/own").json() == {"pages": 0}
    assert ask(theirs, "GET", "/nowhere").json() == {"detail": "Not Found"}
    assert ask(theirs, "GET", "/a/nowhere").json()["error"]["message"] == "no route '/a/nowhere'"


def test_many_streams_at_once_are_each_the_answer_alone(app: ASGIApp) -> None:
    bodies = [
        {"prompt": f"Number {i}", "max_tokens": 12, "seed": i, "temperature": 1, "n": 1 + i % 2} for i in range(24)
    ]
    alone = [[choice["text"] for choice in post(app, PATH, body)["choices"]] for body in bodies]

    async def all_at_once() -> list[list[str]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            responses = await asyncio.gather(*(client.post(PATH, json={**body, "stream": True}) for body in bodies))
        found = []
        for body, response in zip(bodies, responses, strict=True):
            texts = [""] * int(str(body["n"]))
            for data in data_of(response.text)[:-1]:
                for choice in json.loads(data)["choices"]:
                    texts[choice["index"]] += choice["text"]
            found.append(texts)
        return found

    began = time.monotonic()
    assert run(all_at_once()) == alone
    assert time.monotonic() - began < 30
