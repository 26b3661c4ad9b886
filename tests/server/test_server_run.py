"""`grok-engine serve` as a process with sockets and signals, and the limits of its connections."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from grok_engine import AsyncLLM
from grok_engine.cli import _served_name
from grok_engine.server import run as running
from tests.server.calls import idle, run

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
LIMIT = 60.0
PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "My dear", "max_tokens": 450, "temperature": 0, "ignore_eos": True, "stream": True}


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "grok_engine.cli", "serve", "tiny", "--port", "0", *options]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, cwd=ROOT)
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), started.communicate(timeout=LIMIT)
        yield started, line.split()[-1]
    finally:
        started.kill()
        started.communicate(timeout=LIMIT)


def read_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_sigterm_finishes_what_runs_and_refuses_what_is_new() -> None:
    with process("--served-model-name", "holmes", "--api-key", "k", "--max-model-len", "500") as (server, url):
        with httpx.Client(base_url=url, headers={"authorization": "Bearer k"}, timeout=LIMIT) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "holmes"
            assert client.get("/a%0Ab%20c").status_code == 404
            with client.stream("POST", PATH, json=LONG, headers={"x-request-id": "long"}) as response:
                found = read_events(response)
                next(found)
                server.send_signal(signal.SIGTERM)
                refused = 200
                while refused == 200:  # until the signal has arrived
                    refused = httpx.get(f"{url}/health").status_code
                assert refused == 503
                late = client.post(PATH, json={"prompt": "a"})
                assert (late.status_code, late.headers["retry-after"]) == (503, "1")
                *_, last = found
                assert last["choices"][0]["finish_reason"] == "length"
        out, err = server.communicate(timeout=LIMIT)
        assert (server.returncode, out) == (0, "")
        assert "GET /a%0Ab%20c 404" in err  # a client can write no line of its own into the log
        assert re.search(r"INFO long POST /v1/completions 200 \d+ ms\n", err), err
        assert "SIGTERM: finishing 1 requests" in err


@pytest.mark.parametrize("second", [True, False])
def test_a_second_signal_or_the_limit_ends_what_still_runs(second: bool) -> None:
    with process("--drain-timeout", "60" if second else "0.1") as (server, url):
        with httpx.stream("POST", f"{url}{PATH}", json={**LONG, "n": 16}, timeout=LIMIT) as response:
            found = read_events(response)
            next(found)
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            if second:
                time.sleep(0.2)
                server.send_signal(signal.SIGTERM)
                with pytest.raises(httpx.RemoteProtocolError):
                    list(found)
            else:
                *_, last = found
                assert last["error"]["message"] == "the engine is draining"
        _, err = server.communicate(timeout=LIMIT)
        assert server.returncode == 0
        assert time.monotonic() - began < 15
        assert ("again: stopping at once" if second else "requests were aborted") in err


def test_an_address_in_use_is_found_before_loading() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "grok_engine.cli", "serve", "tiny", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=LIMIT, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"grok-engine: error: cannot listen on 127.0.0.1:\d+: Address already in use\n", done.stderr)


@contextmanager
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(running, "HEADER_SECONDS", 0.4)
        patch.setattr(running, "KEEP_ALIVE_SECONDS", 0.2)
        patch.setattr(running, "STALL_SECONDS", 0.2)
        patch.setattr(running, "MAX_HEADER_BYTES", 4096)
        yield


async def served(app: ASGIApp, work: Any) -> None:
    """Run `work(port)` against the app on a socket of this event loop."""
    bound = running.listen("127.0.0.1", 0)
    server = running.server_of(app)
    serving = asyncio.ensure_future(server.serve(sockets=[bound]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        await work(bound.getsockname()[1])
    finally:
        server.should_exit = True
        await serving


def http(body: dict[str, Any], *headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {PATH} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


def test_connections_that_send_no_request_are_closed(app: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(port: int) -> None:
        async def closed_after(data: bytes, *, trickle: bytes = b"") -> float:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            began = time.monotonic()
            reading = asyncio.ensure_future(reader.read())
            while not reading.done():
                if trickle and not writer.is_closing():
                    writer.write(trickle)
                await asyncio.wait([reading], timeout=0.05)
            reading.exception()  # a reset is an end too
            writer.close()
            return time.monotonic() - began

        ask = http({"prompt": "a", "max_tokens": 1})
        times = await asyncio.gather(
            closed_after(b""), closed_after(ask),
            closed_after(b"POST /v1/completions HTTP/1.1\r\n", trickle=b"a: b\r\n"),
            closed_after(b"GET /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\n\r\n", trickle=b"x"),
        )  # fmt: skip
        assert all(0.15 < seconds < 5 for seconds in times), times

    with short_limits(monkeypatch):
        run(served(app, work))


def test_what_is_no_http_or_too_large_is_400(app: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(port: int) -> None:
        for data in (
            b"NONSENSE\r\n\r\n",
            b"GET / HTTP/1.1\r\nx: " + b"y" * 6000,  # and no end of it
            b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            answer = await reader.read()
            writer.close()
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            assert json.loads(body)["error"]["type"] == "invalid_request_error"

    with short_limits(monkeypatch):
        run(served(app, work))


def test_a_body_over_the_limit_is_answered_while_it_comes(app: ASGIApp) -> None:
    async def work(port: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(2):  # the connection can be used again
                response = await client.post(PATH, json={"prompt": "a" * (9 << 20)})
                assert (response.status_code, "more than 8388608" in response.text) == (413, True)

    run(served(app, work))


def test_a_reader_that_stalls_is_cut_off(app: ASGIApp, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sockets hold little, so the server's transport fills: then the time runs, and the request ends."""

    async def work(port: int) -> None:
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stuck, ("127.0.0.1", port))
        many = {"prompt": ["My dear"] * 16, "max_tokens": 480, "logprobs": 20, "temperature": 0, "ignore_eos": True}
        await loop.sock_sendall(stuck, http({**many, "stream": True}))
        while not llm.stats().requests:
            await asyncio.sleep(0.001)
        await idle(llm)
        await asyncio.sleep(0.6)
        received = bytearray()
        try:
            while data := await asyncio.wait_for(loop.sock_recv(stuck, 1 << 20), 10):
                received += data
        except ConnectionResetError:
            pass
        assert b"[DONE]" not in received
        stuck.close()

    with short_limits(monkeypatch):
        run(served(app, work))


def test_many_open_connections(app: ASGIApp) -> None:
    async def work(port: int) -> None:
        open_ones = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(300)))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.post(PATH, json={"prompt": "a", "max_tokens": 2})).status_code == 200
        for _, writer in open_ones:
            writer.write(http({"prompt": "a", "max_tokens": 1}, "connection: close"))
        answers = await asyncio.gather(*(reader.read() for reader, _ in open_ones))
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
        for _, writer in open_ones:
            writer.close()

    run(served(app, work))


def test_clients_see_the_name_of_a_path_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Some-Model.Q4_1.gguf").touch()
    monkeypatch.chdir(tmp_path)
    found = [
        _served_name(str(path)) for path in (tmp_path / "Some-Model.Q4_1.gguf", tmp_path, ".", "org/model", "tiny")
    ]
    assert found == ["Some-Model.Q4_1", tmp_path.name, tmp_path.name, "org/model", "tiny"]
