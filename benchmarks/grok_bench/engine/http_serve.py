"""`grok-engine bench serve --url`: the requests, and the result of sending them to a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from grok_bench.schema import Scalar

from .http_client import Endpoint, HttpJob, Target
from .http_load import drive_http
from .measurement import check_file, publish, summarise
from .workload import Job, arrivals, random_jobs, warmup_jobs

LATE = 0.05  # seconds after its time from which a request says that this client is the bottleneck

# Each is one token in most vocabularies, so that a text of N words has about N tokens.
TEXT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over"
)
WORDS = TEXT.split()


def word_jobs(jobs: Sequence[Job]) -> list[HttpJob]:
    """Texts of as many words as `jobs`, drawn for len(WORDS) token ids, have tokens."""
    return [HttpJob(prompt=" ".join(WORDS[i] for i in job.prompt), output_len=job.output_len) for job in jobs]


def id_jobs(jobs: Sequence[Job]) -> list[HttpJob]:
    """The same prompts, sent as token ids."""
    return [HttpJob(prompt=job.prompt, output_len=job.output_len) for job in jobs]


def read_jobs(path: Path, count: int, output_len: int) -> list[HttpJob]:
    """`count` requests out of a file of JSON lines, again from its start when it ends.

    A line has "prompt" (text or token ids) or "messages", and where it wants "output_len". ValueError with the line.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompt = value["messages"] if "messages" in value else value["prompt"]
            found.append(HttpJob(prompt=prompt, output_len=int(value.get("output_len", output_len))))
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f'{path}:{number} is {line!r:.80}, expected {{"prompt": …}} or {{"messages": […]}}, and "output_len"'
            ) from None
    if not found:
        raise ValueError(f"{path} has no line: expected requests")
    return [found[i % len(found)] for i in range(count)]


def base_url(url: str) -> str:
    """`http://host:port` or `http://host:port/v1`, as the latter."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url {url!r} is no address: expected http://HOST:PORT or http://HOST:PORT/v1")
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def serve_url(
    lengths: dict[str, int],
    *,
    url: str,
    model: str,
    endpoint: Endpoint | None,
    vocab_size: int | None,
    prompts: Path | None,
    extra_body: str | None,
    timeout: float | None,
    num_prompts: int,
    random_range_ratio: float,
    num_warmups: int,
    seed: int,
    file: Path | None,
    rate: float,
    burstiness: float,
    max_concurrency: int | None,
    shown: Mapping[str, Scalar],
    slo: dict[str, float] | None,
) -> None:
    """Send requests to the server at `url`, print what they took and write it to `file`.

    The arguments are the options of `bench serve`; without `model` it is the first that the server lists. Requests are
    greedy and ignore end tokens unless `extra_body` says otherwise. Raises Exit if none was completed.
    """
    check_file(file)
    endpoint = endpoint or "completions"
    if vocab_size is not None and (prompts is not None or endpoint == "chat"):
        other = "--prompts" if prompts is not None else "--endpoint chat"
        raise ValueError(f"--vocab-size {vocab_size} with {other}: expected one of them")
    if prompts is not None:
        jobs = read_jobs(prompts, num_prompts, lengths["output_len"])
        warmup = [jobs[i % num_prompts] for i in range(num_warmups)]
        lengths = {"output_len": lengths["output_len"]}
    else:
        size, spelled = (len(WORDS), word_jobs) if vocab_size is None else (vocab_size, id_jobs)
        drawn = random_jobs(num_prompts, vocab_size=size, range_ratio=random_range_ratio, seed=seed, **lengths)
        jobs, warmup = spelled(drawn), spelled(warmup_jobs(drawn, num_warmups, vocab_size=size, seed=seed))
    body = {"temperature": 0.0, "ignore_eos": True, **_extra_body(extra_body)}
    target = Target(base=base_url(url), model=model, endpoint=endpoint, body=body)
    times = arrivals(num_prompts, rate, burstiness, seed)
    target, run, late = drive_http(target, jobs, times, max_concurrency, warmup=warmup, timeout=timeout or 600.0)
    kind = str(prompts) if prompts is not None else "words" if vocab_size is None else f"ids below {vocab_size}"
    parameters: dict[str, Scalar] = {
        "url": target.base, "endpoint": endpoint, "prompts": kind, "body": json.dumps(body), "seed": seed, **lengths,
        "random_range_ratio": random_range_ratio, "num_requests": num_prompts, **shown, "num_warmups": num_warmups,
    }  # fmt: skip
    result = summarise(run, protocol="serve", model=target.model, parameters=parameters, slo=slo)
    warnings = [f"a request was sent {late:.2f} s late: this client is the bottleneck"] if late > LATE else []
    if errors := [r.error for r in run.records if r.error is not None]:
        warnings.append(f"{len(errors)} of {len(run.records)} requests failed, the first with {errors[0]}")
    publish(result, run, file, "cpu", warnings)
    if not result.completed:
        raise click.exceptions.Exit(1)


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"--extra-body {text!r} is no JSON object")
    return value
