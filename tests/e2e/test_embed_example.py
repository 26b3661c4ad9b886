"""examples/embed_asyncio.py as a program of its own, with several clients at once."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "data" / "goldens" / "g8-a-emb128-k16"
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
LIMIT = 120.0
with np.load(FOLDER / "golden.npz") as _arrays:
    PROMPTS: list[list[int]] = [_arrays[f"p{i}_tokens"].tolist() for i in range(3)]
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


@contextmanager
def server(model: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, str(ROOT / "examples" / "embed_asyncio.py"), model, "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:"), process.communicate(timeout=LIMIT)
        yield process, int(line.rsplit(":", 1)[1])
    finally:
        process.kill()
        process.communicate(timeout=LIMIT)


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
    """What it printed; it must end well, with nothing on standard error."""
    process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (0, "")
    return out


async def ask(port: int, request: Any) -> list[dict[str, Any]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(json.dumps(request).encode() + b"\n")
    lines = [json.loads(line) async for line in reader]
    writer.close()
    return lines


async def leave_midway(port: int, request: Any) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(json.dumps(request).encode() + b"\n")
    for _ in range(2):
        assert json.loads(await reader.readline())["finish_reason"] is None
    writer.transport.abort()


def tokens(lines: list[dict[str, Any]]) -> list[int]:
    return [token for line in lines for token in line["token_ids"]]


def generated(out: str) -> int:
    match = re.search(r"generated_tokens=(\d+)", out)
    assert match, out
    return int(match[1])


def test_several_clients_one_of_which_leaves() -> None:
    async def clients(port: int) -> None:
        alone = [await ask(port, {"prompt": prompt, **GREEDY}) for prompt in PROMPTS]
        for lines in alone:
            assert len(tokens(lines)) == 24
            assert [line["finish_reason"] for line in lines] == [None] * (len(lines) - 1) + ["length"]
        wrong: list[Any] = [
            {"prompt": []}, {"prompt": [5000]}, {"max_tokens": 3}, {"prompt": [5], "max_token": 3}, [1], 7,
            {"prompt": "text"}, {"prompt": [5], "temperature": -1}, {"prompt": [5], "timeout": -1},
        ]  # fmt: skip
        left, *found = await asyncio.gather(
            leave_midway(port, {"prompt": PROMPTS[0], **GREEDY, "max_tokens": 110}),
            *(ask(port, {"prompt": PROMPTS[i % 3], **GREEDY}) for i in range(9)),
            *(ask(port, request) for request in wrong),
        )
        assert left is None
        for i in range(9):
            assert tokens(found[i]) == tokens(alone[i % 3])
        for request, lines in zip(wrong, found[9:], strict=True):
            assert len(lines) == 1, request
            assert set(lines[0]) == {"error"}, request
        assert "token id 5000 is not in the vocabulary" in found[10][0]["error"]

    with server(str(FOLDER)) as (process, port):
        asyncio.run(asyncio.wait_for(clients(port), LIMIT))
        time.sleep(0.2)
        out = stop(process)
    assert (3 + 9) * 24 + 2 <= generated(out) < (3 + 9) * 24 + 110
    assert "EngineStats(requests=0" in out
    assert "pages_used=0" in out


def test_stopping_while_it_serves() -> None:
    """It finishes what it serves. A client that is over its time gets what there is."""

    async def clients(process: subprocess.Popen[str], port: int) -> None:
        late = await ask(port, {"prompt": PROMPTS[0], **GREEDY, "max_tokens": 120, "timeout": 0.001})
        assert late[-1]["finish_reason"] == "abort"
        assert len(tokens(late)) < 120
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(json.dumps({"prompt": PROMPTS[0], **GREEDY, "max_tokens": 120}).encode() + b"\n")
        first = await reader.readline()
        process.send_signal(signal.SIGINT)
        lines = [json.loads(line) for line in [first, *[line async for line in reader]]]
        writer.close()
        assert lines[-1]["finish_reason"] == "length"
        assert len(tokens(lines)) == 120

    with server(str(FOLDER)) as (process, port):
        asyncio.run(asyncio.wait_for(clients(process, port), LIMIT))
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (0, "")
    assert generated(out) >= 120


def test_text_from_the_model_that_ships() -> None:
    with server("tiny") as (process, port):
        request = {"prompt": "My dear Watson,", "max_tokens": 8, "temperature": 0}
        lines = asyncio.run(asyncio.wait_for(ask(port, request), LIMIT))
        stop(process)
    assert len("".join(line["text"] for line in lines).strip()) > 3
    assert lines[-1]["finish_reason"] in ("length", "stop")


def test_it_is_short() -> None:
    assert len((ROOT / "examples" / "embed_asyncio.py").read_text().splitlines()) < 40
