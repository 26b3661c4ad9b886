"""All but generation: models, tokens, health, keys, request ids, and what is no request."""

from __future__ import annotations

import json
import logging
import time

import pytest
from starlette.types import ASGIApp

import grok_engine
from grok_engine import AsyncLLM, LLMEngine
from grok_engine.server import Limits, create_app
from tests.server.calls import TEMPLATE, Exchange, ask, post, refusal, run

COMPLETIONS = {"prompt": "a", "max_tokens": 1}


def test_models(llm: AsyncLLM) -> None:
    app = create_app(llm, served_model_name=["first", "org/second"])
    listed = ask(app, "GET", "/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["first", "org/second"]
    assert listed["data"][0]["max_model_len"] == llm.engine.config.max_len
    assert abs(listed["data"][0]["created"] - time.time()) < 60
    assert ask(app, "GET", "/v1/models/org/second").json() == listed["data"][1]
    assert ask(app, "GET", "/v1/models/third").status_code == 404
    assert post(app, "/v1/completions", COMPLETIONS)["model"] == "first"
    assert post(app, "/v1/completions", {**COMPLETIONS, "model": "org/second"})["model"] == "org/second"
    for path, body in (
        ("/v1/completions", COMPLETIONS), ("/v1/chat/completions", {"messages": []}), ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ):  # fmt: skip
        error = refusal(app, path, {**body, "model": "third"}, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert error["message"] == "model 'third' is not served: expected 'first' or 'org/second'"


def test_tokenize_and_back(app: ASGIApp, llm: AsyncLLM) -> None:
    text = "My dear Watson, “naïve”"
    found = post(app, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert found["tokens"] == llm.encode(text, add_special_tokens=True)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["token_strs"][:2] == [" My", " de"]
    assert found["max_model_len"] == llm.engine.config.max_len
    bare = post(app, "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert (bare["tokens"], bare["token_strs"]) == (llm.encode(text), None)
    assert post(app, "/detokenize", {"tokens": bare["tokens"]}) == {"prompt": text}
    messages = [{"role": "user", "content": "hello"}]
    chat = post(app, "/tokenize", {"messages": messages, "add_generation_prompt": False})
    want = llm.apply_chat_template(messages, chat_template=TEMPLATE, add_generation_prompt=False)
    assert chat["tokens"] == want
    assert post(app, "/tokenize", {"prompt": ""})["tokens"] == []
    assert "one of prompt and messages" in refusal(app, "/tokenize", {})["message"]
    assert "5000" in refusal(app, "/detokenize", {"tokens": [5000]})["message"]
    assert "tokens[0]='a': expected int" in refusal(app, "/detokenize", {"tokens": ["a"]})["message"]


def test_health_and_version() -> None:
    async def states() -> list[int]:
        llm = AsyncLLM(LLMEngine("tiny", num_pages=16))
        app = create_app(llm)
        found = []

        async def look() -> None:
            exchange = Exchange(app, "/health", b"")
            exchange.scope["method"] = "GET"
            await exchange.run()
            found.append(exchange.status)
            exchange = Exchange(app, "/v1/completions", COMPLETIONS)
            await exchange.run()
            found.append(exchange.status)
            if exchange.status == 503:
                assert (b"retry-after", b"1") in [(k.lower(), v) for k, v in exchange.sent[0]["headers"]]
                assert json.loads(exchange.text)["error"]["type"] == "server_error"

        await look()
        await llm.sleep()
        await look()
        await llm.wake_up()
        await look()
        await llm.drain()
        await look()
        await llm.close()
        await look()
        version = Exchange(app, "/version", b"")
        version.scope["method"] = "GET"
        await version.run()
        assert json.loads(version.text) == {"version": grok_engine.__version__}
        return found

    assert run(states()) == [200, 200, 503, 503, 200, 200, 503, 503, 503, 503]


def test_keys(llm: AsyncLLM) -> None:
    app = create_app(llm, api_key=["sesame", "öffne"])
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "sesame"},
        {"authorization": "Basic sesame"},
    ):
        response = ask(app, "POST", "/v1/completions", COMPLETIONS, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "sesame" not in response.text
    for key in ("sesame", "öffne"):
        headers = {"authorization": f"bearer {key}".encode()}
        post(app, "/v1/completions", COMPLETIONS, headers=headers)
    assert ask(app, "GET", "/v1/models").status_code == 401
    assert ask(app, "POST", "/tokenize", {"prompt": "a"}).status_code == 401
    assert ask(app, "GET", "/nowhere").status_code == 401
    assert ask(app, "GET", "/health").status_code == ask(app, "GET", "/version").status_code == 200
    with pytest.raises(ValueError, match="expected none that is empty"):
        create_app(llm, api_key="")


def test_request_ids_are_in_answers_and_logs(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "grok_engine.server"):
        given = ask(app, "POST", "/v1/completions", COMPLETIONS, headers={"x-request-id": "mine-1"})
        again = ask(app, "POST", "/v1/completions", COMPLETIONS, headers={"x-request-id": "mine-1"})
        made = ask(app, "GET", "/nowhere", headers={"x-request-id": "no\tid"})
    assert given.headers["x-request-id"] == again.headers["x-request-id"] == "mine-1"
    assert len(made.headers["x-request-id"]) == 32
    lines = [record.getMessage() for record in caplog.records if record.name == "grok_engine.server.app"]
    assert lines[0].startswith("mine-1 POST /v1/completions 200 ")
    assert lines[2].startswith(f"{made.headers['x-request-id']} GET /nowhere 404 ")


def test_what_is_no_request(app: ASGIApp) -> None:
    for method, path, status, words in (
        ("GET", "/v1/completions", 405, "GET '/v1/completions': expected POST"),
        ("POST", "/nowhere", 404, "'/nowhere'"),
        ("DELETE", "/v1/models", 405, "expected GET, HEAD"),
    ):  # fmt: skip
        response = ask(app, method, path)
        assert response.status_code == status
        assert words in response.json()["error"]["message"]
    for body, words in (
        (b"", "the body is not JSON"), (b"{", "the body is not JSON"), (b"\xff\xfe", "the body is not JSON"),
        (b"[]", "the body: expected object, got array"), (b"{}", "missing required field prompt"),
        (b'{"prompt": "a", "temperature": NaN}', "not JSON"), (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": ' + b"[" * 100000, "nested too deep"), (b'{"user":' + b'{"a":' * 20000 + b"1", "nested too deep"),
        (b'{"prompt": "a", "logit_bias": ' + b"[" * 900 + b"]" * 900 + b"}", "logit_bias"),
        (b'{"prompt": "\\ud800"}', "not JSON"), (b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}", "max_tokens"),
        (b'{"prompt": "a", "seed": -1}', "seed=-1"), (b'{"prompt": "a", "n": true}', "n=True: expected int"),
    ):  # fmt: skip
        message = refusal(app, "/v1/completions", body, headers={"content-type": "application/json"})["message"]
        assert words.lower() in message.lower(), (body[:60], message)
    for path in ("/v1/models/", "/v1/completions/"):  # a redirection would name the host that a proxy calls us by
        assert ask(app, "POST", path, COMPLETIONS).status_code in (404, 405)
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert "content-type" in refusal(app, "/v1/completions", b"{}", 415, headers={"content-type": kind})["message"]


def test_bodies_are_bounded(llm: AsyncLLM) -> None:
    app = create_app(llm, limits=Limits(max_body_bytes=1000, body_seconds=0.2))
    big = json.dumps({"prompt": "a" * 1000}).encode()
    assert "more than 1000" in refusal(app, "/v1/completions", big, 413)["message"]

    async def in_parts() -> None:
        for length in ({}, {"content-length": "10"}, {"content-length": "x"}):  # which may be missing, or wrong
            exchange = Exchange(app, "/v1/completions", big[:600], length)
            exchange.more(big[600:])
            await exchange.run()
            assert exchange.status == 413
        told = Exchange(app, "/v1/completions", b"", {"content-length": "99999999999999"})
        await told.run()
        assert (told.status, "99999999999999 bytes" in told.text) == (413, True)
        slow = Exchange(app, "/v1/completions", b'{"prompt"')
        slow.more()
        await slow.run()
        assert (slow.status, "within 0.2 s" in slow.text) == (408, True)
        gone = Exchange(app, "/v1/completions", b'{"prompt"')
        gone.more()
        gone.leave()
        await gone.run()
        assert gone.sent == []

    run(in_parts())
