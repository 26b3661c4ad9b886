"""What must come out: each job alone, in an engine that serves one request at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from grok_engine import CompletionOutput, LLMEngine, RequestOutput, StreamChunk

from .traffic import Job, Run, Seen
from .world import ALONE

INJECTED = "injected"  # in the text of every failure that the soak causes itself


class Oracle:
    """Outputs of jobs that run alone, kept by number."""

    def __init__(self, model: str | Path, options: dict[str, Any]) -> None:
        self._engine = LLMEngine(model, **{**options, **ALONE})
        self._outputs: dict[int, RequestOutput] = {}

    def alone(self, job: Job) -> RequestOutput:
        if job.number not in self._outputs:
            self._engine.add_request("alone", job.prompt, job.params)
            while self._engine.has_unfinished_requests():
                outputs = self._engine.step()
            self._outputs[job.number] = outputs[-1]
        return self._outputs[job.number]

    def logits(self, job: Job) -> Tensor:
        return self._engine.logits(job.prompt)

    def close(self) -> None:
        self._engine.close()

    def judge(self, run: Run) -> tuple[int, list[str]]:
        """How many tokens were compared, and what differs. A run that was ended has the beginning of each answer."""
        alone, wrong, compared = self.alone(run.job), list(run.wrong), 0
        for index, seen in run.answers.items():
            compared += len(seen.tokens)
            wrong += [f"answer {index}: {what}" for what in _differences(seen, alone.outputs[index])]
        if run.ended == "finished" and len(run.answers) != len(alone.outputs):
            wrong.append(f"{len(run.answers)} answers, expected {len(alone.outputs)}")
        scored = run.output.prompt_logprobs if run.output else None
        if scored is not None:
            expected = alone.prompt_logprobs or []
            pairs = zip(scored, expected, strict=True)
            if any(a != b for a, b in pairs if a is not None or run.ended == "finished"):
                wrong.append(f"prompt_logprobs {scored}, alone {expected}")
        return compared, wrong


def _differences(seen: Seen, alone: CompletionOutput) -> Iterator[str]:
    last, count = seen.last, len(seen.tokens)
    reason, error = last.finish_reason if last else None, last.error if isinstance(last, CompletionOutput) else None
    whole = reason in ("stop", "length") or (reason == "error" and INJECTED not in str(error))
    if seen.tokens != (alone.token_ids if whole else alone.token_ids[:count]):
        yield f"tokens {seen.tokens}, alone {alone.token_ids}"
    if seen.logprobs is not None and seen.logprobs != (alone.logprobs or [])[: len(seen.logprobs)]:
        yield f"logprobs {seen.logprobs}, alone {alone.logprobs}"
    if whole:
        assert last is not None
        if seen.text != alone.text:
            yield f"text {seen.text!r}, alone {alone.text!r}"
        if isinstance(last, StreamChunk):
            if reason != alone.finish_reason:
                yield f"{reason}, alone {alone.finish_reason}"
            return
        for name in ("finish_reason", "stop_reason", "error", "cumulative_logprob"):
            if getattr(last, name) != getattr(alone, name):
                yield f"{name}={getattr(last, name)!r}, alone {getattr(alone, name)!r}"
    else:  # text held back is shown at an end: the start of a stop string, or of a character
        stopped = alone.stop_reason if isinstance(alone.stop_reason, str) else ""
        if not (alone.text + stopped).startswith(seen.text.rstrip("\ufffd")):
            yield f"text {seen.text!r} begins neither {alone.text!r} nor what follows it"
