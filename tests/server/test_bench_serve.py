"""`grok-engine bench serve --url`: what it sends, and what it measures of a server whose delays are known.

Times are compared with a script's, never with another measurement. The judge of the figures is the scripted server; an
independent client of vLLM's definitions reads the same streams beside it.
"""

from __future__ import annotations

import json
import time
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from grok_bench import schema
from grok_bench.engine.http_client import HttpJob, Target
from grok_bench.engine.http_load import drive_http
from grok_bench.engine.http_serve import WORDS, base_url, read_jobs
from grok_bench.engine.sse import EventStream
from grok_engine.cli import main
from tests.server.scripted import Script, delta, serving, stream, text, usage

Captured = pytest.CaptureFixture[str]
LENGTHS = ("--input-len", "5", "--output-len", "6")


def bench(url: str, tmp_path: Path, *arguments: str, status: int = 0) -> schema.EngineResult:
    file = tmp_path / "result.json"
    assert main(["bench", "serve", "--url", url, "--json", str(file), *arguments]) == status
    (result,) = schema.load(file).results
    assert isinstance(result, schema.EngineResult)
    return result


# Events


SAID = ': a comment\r\n\r\ndata: {"a": "\u2028 é"}\r\n\r\nevent: x\ndata:1\ndata: 2\n\n\n\ndata: cr\r\rdata: [DONE]\n\n'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_come_whole_however_their_bytes_are_cut(size: int) -> None:
    events, said = EventStream(), SAID.encode()
    found = [event for i in range(0, len(said), size) for event in events.feed(said[i : i + size])]
    assert found == ['{"a": "\u2028 é"}', "1\n2", "cr", "[DONE]"]


def test_an_event_without_its_blank_line_is_not_given() -> None:
    assert EventStream().feed(b"data: half\n") == []


# Figures


def vllm_figures(url: str, body: dict[str, Any]) -> tuple[float, list[float], float]:
    """TTFT, ITL and E2E as `vllm bench serve` defines them, by a client of its own over a blocking socket."""
    asked = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(asked, timeout=10) as answer:
        said = (line for line in answer if line.startswith(b"data: {") and json.loads(line[6:])["choices"])
        times = [time.perf_counter() - began for _ in said]
    return times[0], [b - a for a, b in pairwise(times)], times[-1]


def test_the_figures_are_those_of_the_script_and_of_another_client(tmp_path: Path) -> None:
    script = Script(stream(first=0.2, gap=0.05, tokens=6))
    with serving(script) as url:
        result = bench(url, tmp_path, *LENGTHS, "--num-prompts", "8", "--goodput", "ttft:1000", "e2el:200")
        ttft, itl, e2e = vllm_figures(url, {"stream": True})
    m = {name: found for name, found in result.metrics.items() if found is not None}
    late = 0.1  # of a chunk on a busy machine
    for name, due in {"ttft": 0.2, "itl": 0.05, "tpot": 0.05, "e2e": 0.45}.items():
        assert due - 0.02 <= m[name].p50 <= due + late, (name, m[name])
    assert m["ttft"].p50 == pytest.approx(ttft, abs=late)
    assert m["itl"].mean == pytest.approx(sum(itl[:-1]) / 5, abs=late)  # theirs counts the closing chunk as a token
    assert m["e2e"].p50 == pytest.approx(e2e, abs=late)
    assert (result.completed, result.failed, result.model) == (8, 0, "scripted")
    assert (result.input_tokens, result.output_tokens) == (8 * 7, 8 * 6)  # as the server counts them
    assert 0.45 <= result.duration_seconds < 0.45 + 4 * late
    assert result.output_tokens_per_second == pytest.approx(48 / result.duration_seconds)
    assert result.goodput_per_second == 0.0  # none ends within 200 ms
    assert script.most_at_once == 8


def test_chunks_of_several_tokens_count_by_the_servers_usage() -> None:
    script = Script([(0.1, text("a b")), (0.2, text("c d e", finish_reason="length")), (0.0, usage(3, 5))])
    with serving(script) as url:
        _, run, _ = drive_http(Target(base=f"{url}/v1", model=""), [HttpJob(prompt="x", output_len=5)], [0.0])
    (record,) = run.records
    assert (record.output_tokens, record.input_tokens, len(record.itl)) == (5, 3, 1)
    assert record.tpot == pytest.approx(record.itl[0] / 4)


def test_what_only_opens_or_closes_a_message_is_no_token() -> None:
    chunks = [
        (0.0, delta(role="assistant", content="")),
        (0.2, delta(content="Yes")),
        (0.0, delta(content="")),  # half of a character
        (0.0, delta(tool_calls=[{"index": 0, "function": {"arguments": "{"}}])),
        (0.0, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
    ]
    with serving(Script(chunks)) as url:
        target = Target(base=f"{url}/v1", model="m", endpoint="chat")
        _, run, _ = drive_http(target, [HttpJob(prompt="x", output_len=5)], [0.0])
    (record,) = run.records
    assert len(record.times) == 3
    assert record.ttft is not None
    assert record.ttft >= 0.19


def test_requests_are_sent_at_their_times_and_wait_for_a_slot() -> None:
    script = Script(stream(first=0.1, gap=0.0, tokens=1))
    jobs = [HttpJob(prompt="x", output_len=1)] * 6
    with serving(script) as url:
        target = Target(base=f"{url}/v1", model="m")
        _, spaced, _ = drive_http(target, jobs[:3], [0.0, 0.3, 0.6])
        assert script.most_at_once == 1
        _, queued, _ = drive_http(target, jobs, [0.0] * 6, max_concurrency=2)
    assert [r.arrival for r in spaced.records] == pytest.approx([0.0, 0.3, 0.6], abs=0.1)
    assert script.most_at_once == 2
    assert queued.seconds >= 0.3
    assert all(r.ttft is not None and r.ttft < 0.25 for r in queued.records)  # the wait for a slot does not count


# Requests


def test_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(stream(0.0, 0.0, 2))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(script) as url:
        result = bench(f"{url}/v1/", tmp_path, *LENGTHS, "--num-prompts", "2", "--prefix-len", "2")
        warmup, first, second = script.seen
        assert first["prompt"].split()[:2] == second["prompt"].split()[:2] != warmup["prompt"].split()[:2]
        assert all(
            len(said["prompt"].split()) == 7 and set(said["prompt"].split()) <= set(WORDS) for said in script.seen
        )
        del first["prompt"]
        assert first == {
            "model": "scripted", "max_tokens": 6, "stream": True, "stream_options": {"include_usage": True},
            "temperature": 0.0, "ignore_eos": True,
        }  # fmt: skip
        assert script.headers[0]["Authorization"] == "Bearer secret"
        assert (result.parameters["url"], result.load_seconds) == (f"{url}/v1", None)
        bench(url, tmp_path, *LENGTHS, "--num-prompts", "1", "--vocab-size", "9", "--model", "m", "--num-warmups", "0")
        assert script.seen[-1]["model"] == "m"
        assert len(script.seen[-1]["prompt"]) == 5
        assert set(script.seen[-1]["prompt"]) <= set(range(9))


def test_requests_of_a_file_go_to_the_chat(tmp_path: Path) -> None:
    script, file = Script([(0.0, delta(content="a")), (0.0, "data: [DONE]\n\n")]), tmp_path / "requests"
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file.write_text(f'{{"prompt": "p", "output_len": 3}}\n\n{json.dumps({"messages": said})}\n')
    options = (
        "--endpoint",
        "chat",
        "--prompts",
        str(file),
        "--num-prompts",
        "3",
        "--num-warmups",
        "0",
        "--output-len",
        "9",
    )
    with serving(script) as url:
        bench(url, tmp_path, *options, "--extra-body", '{"ignore_eos": false, "top_k": 5}', "--max-concurrency", "1")
    asked = [(request["messages"], request["max_completion_tokens"]) for request in script.seen]
    p = [{"role": "user", "content": "p"}]
    assert asked == [(p, 3), (said, 9), (p, 3)]
    assert (script.seen[0]["ignore_eos"], script.seen[0]["top_k"]) == (False, 5)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"requests:1 is '\[1\]', expected"):
        read_jobs(file, 1, 1)


# Failures


FAULTS: list[tuple[Script, str]] = [
    (Script([], status=503), "503 Service Unavailable: scripted refusal"),
    (Script([(0.0, text("a")), (0.0, {"error": {"message": "planted"}})]), "planted"),
    (Script([(0.0, text("a")), (0.0, text("", finish_reason="error"))]), "finish_reason 'error'"),
    (Script([(0.0, text("a")), (0.0, None)]), "ClientPayloadError"),
    (Script([(0.0, text("", finish_reason="length"))]), "without a token"),
    (Script([(0.0, "data: {\n\n")]), "JSONDecodeError"),
    (Script([(0.0, text("a")), (5.0, text("b"))]), "TimeoutError"),
]


@pytest.mark.parametrize(("script", "error"), FAULTS, ids=[error.split()[0] for _, error in FAULTS])
def test_a_failure_is_counted_and_named(script: Script, error: str, tmp_path: Path, capsys: Captured) -> None:
    with serving(script) as url:
        options = (*LENGTHS, "--num-prompts", "2", "--num-warmups", "0", "--timeout", "0.5")
        result = bench(url, tmp_path, *options, status=1)
        assert (result.completed, result.failed) == (0, 2)
        shown = " ".join(capsys.readouterr().out.split())
        assert error in shown
        assert "2 of 2 requests failed" in shown
        # a warmup that fails ends it with one line, before anything is measured
        assert main(["bench", "serve", "--url", url, *LENGTHS, "--num-prompts", "1", "--timeout", "0.5"]) == 2
        assert error in capsys.readouterr().err


WRONG = [
    (("--url", "localhost:1"), "no address"),
    (("--url", "http://127.0.0.1:1"), "does not answer"),
    (("--url", "http://127.0.0.1:1", "--dummy"), "--dummy with --url"),
    (("--url", "http://127.0.0.1:1", "--vocab-size", "9", "--endpoint", "chat"), "with --endpoint chat"),
    (("--url", "http://127.0.0.1:1", "--extra-body", "[]"), "no JSON object"),
    (("--vocab-size", "9"), "--vocab-size without --url"),
]


@pytest.mark.parametrize(("arguments", "error"), WRONG)
def test_wrong_options_are_refused(arguments: tuple[str, ...], error: str, capsys: Captured) -> None:
    assert main(["bench", "serve", "--num-prompts", "1", *arguments]) == 2
    assert error in capsys.readouterr().err


def test_base_url() -> None:
    assert {base_url(url) for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/")} == {
        "http://a:1/v1"
    }
    assert base_url("https://a/prefix") == "https://a/prefix/v1"
