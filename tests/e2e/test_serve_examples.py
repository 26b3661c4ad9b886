"""The examples that mount the HTTP server, as programs of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
LIMIT = 60.0
BODY = {"prompt": "My dear Watson,", "max_tokens": 5, "temperature": 0}


@contextmanager
def program(*command: str) -> Iterator[str]:
    """Its address, once it answers. It must end well by SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    full = [part.replace("PORT", str(port)) for part in command]
    process = subprocess.Popen([sys.executable, *full], env=ENV, cwd=EXAMPLES, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + LIMIT
        while time.monotonic() < until and process.poll() is None:
            try:
                httpx.get(f"http://127.0.0.1:{port}/")
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1]
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode in (0, -signal.SIGTERM), err  # uvicorn raises the signal again
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate(timeout=LIMIT)


def test_fastapi_with_a_route_of_its_own() -> None:
    with program("-m", "uvicorn", "embed_fastapi:app", "--port", "PORT") as url:
        answer = httpx.post(f"{url}/llm/v1/completions", json=BODY, timeout=LIMIT).json()
        own = httpx.get(f"{url}/opening", params={"words": 5}, timeout=LIMIT).json()
        assert answer["model"] == "holmes"
        assert answer["choices"][0]["text"] == own["text"]
        assert "/opening" in httpx.get(f"{url}/openapi.json").json()["paths"]


def test_two_models_in_one_process() -> None:
    golden = ROOT / "tests" / "data" / "goldens" / "g8-a-emb128-k16"
    with program("serve_two.py", "PORT", "small=tiny", f"golden={golden}") as url:
        small = httpx.post(f"{url}/small/v1/completions", json=BODY, timeout=LIMIT).json()
        assert (small["model"], len(small["choices"][0]["text"]) > 3) == ("small", True)
        body = {**BODY, "prompt": [5, 6, 7], "return_token_ids": True, "ignore_eos": True}
        golden_answer = httpx.post(f"{url}/golden/v1/completions", json=body, timeout=LIMIT).json()
        assert golden_answer["model"] == "golden"
        assert len(golden_answer["choices"][0]["token_ids"]) == 5
        assert httpx.post(f"{url}/small/v1/completions", json={**BODY, "model": "golden"}).status_code == 404
