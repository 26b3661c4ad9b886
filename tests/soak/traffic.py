"""Random requests of every kind, and what a client sees of one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from grok_engine import (
    CompletionOutput,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StreamChunk,
    StructuredOutput,
)

VOCAB = 1536
SHARED = [
    "To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any other name.",
    "My dear Watson, you see but you do not observe. The distinction is clear.",
]
WORDS = ["Holmes", "the ", "door ", "ü", "\n\n", "“I think", " 221B", "Lestrade,", "—", " said he.", "日本", "a"]
STOPS = ["the", "e", "\n", ". ", "ing", "zq", "Holmes", "ü"]
STRUCTURED = {
    "regex": [{"regex": r"[a-z]{1,12}( [a-z]+){0,3}\."}, {"regex": r"\d{4}-\d\d-\d\d"}, {"regex": "(yes|no|Käse)"}],
    "json": [
        {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y", None]}},
                         "required": ["a", "b"], "additionalProperties": False}},
        {"json_schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}},
        {"json_schema": '{"type": "string", "maxLength": 8}'},
    ],
    "grammar": [
        {"grammar": 'root ::= ("ab" | "c" root) "."'}, {"grammar": 'start: word (" " word)*\nword: /[a-z]{1,6}/'},
    ],
}  # fmt: skip


def discourage_repeats(token_ids: list[int], logits_V: Tensor) -> Tensor:
    """A logits processor that edits in place, and depends on the tokens so far."""
    if token_ids:
        logits_V[token_ids[-1]] -= 2.0
    return logits_V


@dataclass(frozen=True)
class Job:
    """A request that runs many times: each time with a fate of its own, and alone once, for what must come out."""

    number: int
    prompt: Any
    params: SamplingParams
    priority: int
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        plain = SamplingParams()
        names = [f.name for f in fields(plain) if getattr(self.params, f.name) != getattr(plain, f.name)]
        options = ", ".join(f"{name}={getattr(self.params, name)!r:.200}" for name in names)
        return f"job {self.number}, {self.prompt!r:.200}, {options}"


def draw_jobs(rng: random.Random, count: int) -> list[Job]:
    return [draw_job(rng, number) for number in range(count)]


def draw_job(rng: random.Random, number: int) -> Job:
    kinds: list[str] = []

    def now(kind: str, share: float) -> bool:
        if hit := rng.random() < share:
            kinds.append(kind)
        return hit

    prompt: Any
    if now("text", 0.5):
        prompt = (rng.choice(SHARED)[: rng.choice([9, 40, 99])] if now("shared prefix", 0.6) else "") + "".join(
            rng.choices(WORDS, k=rng.randint(1, 5))
        )
    else:
        shared = random.Random(rng.randrange(2)).choices(range(3, VOCAB), k=40)
        ids = shared[: rng.choice([8, 33, 40])] if now("shared prefix", 0.6) else []
        prompt = ids + rng.choices(range(3, VOCAB), k=rng.randint(1, 50) if now("long", 0.2) else rng.randint(1, 6))
    if now("odd prompt", 0.2):
        prompt = {"prompt": prompt} if isinstance(prompt, str) else rng.choice([np.array, tuple, _tokens])(prompt)
    sampled = now("sampled", 0.6)
    options: dict[str, Any] = {
        "max_tokens": rng.choice([1, 3, 10, 16, 30]), "seed": rng.randrange(2**63), "temperature": 0.0
    }  # fmt: skip
    if sampled:
        options |= {
            "temperature": rng.choice([0.3, 1.0, 4.0]), "top_p": rng.choice([1.0, 0.9]),
            "top_k": rng.choice([0, 1, 40]), "min_p": rng.choice([0.0, 0.02]),
        }  # fmt: skip
    if now("n", 0.25):
        options["n"] = rng.choice([2, 3, 5])
    if now("penalties", 0.25):
        options |= {"repetition_penalty": rng.choice([1.0, 1.3]), "frequency_penalty": 0.5, "presence_penalty": -0.25}
    if now("logprobs", 0.3):
        options["logprobs"] = rng.choice([0, 1, 5, 20])
    if now("prompt_logprobs", 0.15):
        options["prompt_logprobs"] = rng.choice([0, 3])
    if now("stop", 0.25):
        options |= {"stop": rng.sample(STOPS, 3), "include_stop_str_in_output": rng.random() < 0.3}
    if now("stop_token_ids", 0.1):
        options["stop_token_ids"] = rng.choices(range(3, VOCAB), k=200)
    if now("bad_words", 0.15):
        options["bad_words"] = rng.sample(STOPS[:-1], 2)
    if now("logit_bias", 0.15):
        options["logit_bias"] = {t: rng.uniform(-5, 5) for t in rng.sample(range(VOCAB), 50)}
    if now("min_tokens", 0.15):
        options["min_tokens"] = rng.randint(0, options["max_tokens"])
    if now("processor", 0.1):
        options["logits_processors"] = [discourage_repeats]
    if now("structured", 0.25):
        kinds.append(kind := rng.choice(list(STRUCTURED)))
        options["structured"] = StructuredOutput(**rng.choice(STRUCTURED[kind]))
    elif now("ignore_eos", 0.5):
        options["ignore_eos"] = True
    if not kinds:
        kinds.append("plain")
    return Job(number, prompt, SamplingParams(**options), rng.choice([0, 0, 0, 1, -1]), tuple(kinds))


def _tokens(ids: Sequence[int]) -> dict[str, Any]:
    return {"prompt_token_ids": list(ids), "prompt": "shown, not read"}


@dataclass
class Seen:
    """What a client was given of one answer."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] | None = None
    last: CompletionOutput | StreamChunk | None = None


@dataclass
class Run:
    """One run of a job, as its client sees it. `wrong` collects what no order of events can explain."""

    job: Job
    face: str
    request_id: str
    kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY
    fate: str = "finish"
    answers: dict[int, Seen] = field(default_factory=dict)
    output: RequestOutput | None = None  # the last one
    ended: str = "unanswered"
    wrong: list[str] = field(default_factory=list)

    def params(self, *processors: Any) -> SamplingParams:
        p = self.job.params
        return replace(p, output_kind=self.kind, logits_processors=(*p.logits_processors, *processors))

    def take(self, output: RequestOutput) -> None:
        """The next output of the request."""
        if self.output is not None and self.output.finished:
            self.wrong.append("an output after the last one")
        if not output.finished and self.kind is RequestOutputKind.FINAL_ONLY:
            self.wrong.append("FINAL_ONLY with an output before the last")
        for c in output.outputs:
            seen = self.answers.setdefault(c.index, Seen())
            if self.kind is RequestOutputKind.DELTA:
                seen.tokens, seen.text = seen.tokens + c.token_ids, seen.text + c.text
                seen.logprobs = None if c.logprobs is None else (seen.logprobs or []) + c.logprobs
            else:
                if c.token_ids[: len(seen.tokens)] != seen.tokens or not c.text.startswith(seen.text):
                    self.wrong.append(f"answer {c.index} became {c.token_ids}, it was {seen.tokens}")
                seen.tokens, seen.text, seen.logprobs = list(c.token_ids), c.text, c.logprobs
            seen.last = c
            c.token_ids.append(-1)  # what a client does to its output is nobody else's
        self.output = output
        output.prompt_token_ids[:] = [0]
        if output.finished:
            reasons = {c.last.finish_reason for c in self.answers.values() if c.last}
            self.ended = next((r for r in ("error", "abort") if r in reasons), "finished")

    def chunk(self, chunk: StreamChunk) -> None:
        """The next token of a stream."""
        seen = self.answers.setdefault(0, Seen())
        seen.tokens, seen.text, seen.last = [*seen.tokens, chunk.token_id], seen.text + chunk.text, chunk
        if chunk.finish_reason is not None:
            self.ended = "finished"
