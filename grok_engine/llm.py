"""LLM: generate text from a model, synchronously."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import EngineConfig
from .engine import LLMEngine
from .models.decoder import Decoder
from .progress import byte_bar, request_bar
from .runtime.builder import Prompt
from .runtime.request import RequestOutput
from .runtime.text import FinishReason
from .sampling.params import RequestOutputKind, SamplingParams
from .tokenizer.base import Tokenizer


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One new token, the text that became final with it, and, with the last token, why generation ended."""

    token_id: int
    text: str
    finish_reason: FinishReason | None


class LLM:
    """A model in an engine of its own.

    model: `tiny`, which ships with the package, a folder that holds a release's `ckpt-0`, or one that `grok-engine
    convert` wrote. dtype: of the computation, bfloat16 or float32. weights: None keeps the checkpoint's format (the
    release's int8, bit for bit), bf16 or fp32 dequantise while loading, fp8 rounds to e4m3 with one scale per output
    channel. The other options are those of `EngineConfig`. Loading and generating show a progress bar on a terminal.
    Errors are those of `LLMEngine`.
    """

    def __init__(self, model: str | Path = "tiny", **options: Any) -> None:
        with byte_bar("loading") as progress:
            self.engine = LLMEngine(model, progress=progress, **options)
        self.config: EngineConfig = self.engine.config  # resolved
        self.tokenizer: Tokenizer | None = self.engine.tokenizer  # without one, prompts and outputs are token ids
        self._ids = count()
        self._outputs: dict[str, deque[RequestOutput]] = {}  # by request: a step of one call may serve others too

    @property
    def model(self) -> Decoder:
        """The decoder."""
        return self.engine.model

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked as `LLMEngine.encode` does."""
        return self.engine.encode(prompt)

    def logits(self, token_ids: Prompt, *, chunk: int | None = None) -> Tensor:
        """logits_TV in fp32 after each token, computed `chunk` tokens at a time; no result depends on `chunk`."""
        return self.engine.logits(token_ids, chunk=chunk)

    def score(self, token_ids: Prompt) -> Tensor:
        """(T − 1,) fp32: the log-probability of each token after the first, given those before it."""
        ids = self.encode(token_ids)
        logits_TV = self.logits(ids)[:-1]
        targets = torch.tensor(ids[1:], dtype=torch.int64, device=logits_TV.device)[:, None]
        return torch.log_softmax(logits_TV, -1).gather(1, targets).squeeze(1)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts (text or token ids) in one batch. Outputs are in the order of the prompts.

        Nothing runs unless all prompts are valid.
        """
        requests = _as_requests(prompts)
        if isinstance(sampling_params, Sequence):
            params = list(sampling_params)
            if len(params) != len(requests):
                raise ValueError(f"{len(params)} sampling_params for {len(requests)} prompts: expected as many, or one")
        else:
            params = [SamplingParams() if sampling_params is None else sampling_params] * len(requests)
        finished: dict[str, RequestOutput] = {}
        outputs: deque[RequestOutput] = deque()
        ids: list[str] = []
        try:
            for prompt, param in zip(requests, params, strict=True):
                if isinstance(param, SamplingParams):
                    param = replace(param, output_kind=RequestOutputKind.FINAL_ONLY)
                ids.append(self._add(prompt, param, outputs))
            with request_bar() as progress:
                progress(0, len(ids))
                while len(finished) < len(ids):
                    output = self._next(outputs)
                    finished[output.request_id] = output
                    progress(len(finished), len(ids))
        finally:
            self._end(ids)
        return [finished[request_id] for request_id in ids]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Generate token by token. The request is checked at the call; leaving the loop aborts it."""
        params = SamplingParams() if params is None else params
        if isinstance(params, SamplingParams):
            if params.n != 1:
                raise ValueError(f"n={params.n}: a stream has one answer, expected 1")
            params = replace(params, output_kind=RequestOutputKind.DELTA)
        outputs: deque[RequestOutput] = deque()
        request_id = self._add(prompt, params, outputs)
        stream = self._stream(request_id, outputs)
        weakref.finalize(stream, self._end, [request_id]).atexit = False  # if dropped unread
        return stream

    def _stream(self, request_id: str, outputs: deque[RequestOutput]) -> Iterator[StreamChunk]:
        try:
            while True:
                answer = self._next(outputs).outputs[0]
                if answer.error is not None:
                    raise RuntimeError(answer.error)
                yield StreamChunk(answer.token_ids[0], answer.text, answer.finish_reason)
                if answer.finish_reason is not None:
                    return
        finally:
            self._end([request_id])

    def _add(self, prompt: Prompt, params: SamplingParams, outputs: deque[RequestOutput]) -> str:
        request_id = str(next(self._ids))
        self.engine.add_request(request_id, prompt, params)
        self._outputs[request_id] = outputs
        return request_id

    def _next(self, outputs: deque[RequestOutput]) -> RequestOutput:
        """The next output of one call. Its steps serve other calls too."""
        while not outputs:
            for output in self.engine.step():
                if output.request_id in self._outputs:
                    self._outputs[output.request_id].append(output)
        return outputs.popleft()

    def _end(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._outputs.pop(request_id, None)
        if not self.engine.closed:
            self.engine.discard_request(request_ids)

    def close(self) -> None:
        """Free weights and pages."""
        self.engine.close()


def _as_requests(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list; arrays and tensors count as the lists they hold."""
    if isinstance(prompts, str):
        return [prompts]
    values = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(values, Sequence):
        raise ValueError(f"prompts={prompts!r}: expected text, token ids, or a list of them")
    several = not values or isinstance(values[0], (str, Sequence)) or getattr(values[0], "ndim", 0) > 0
    return list(values) if several else [values]
