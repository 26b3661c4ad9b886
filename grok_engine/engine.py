"""LLM: a model loaded from a folder, its logits, and text from it. One request at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from typing import Literal, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from .checkpoint.xai import XaiCheckpoint
from .config import ConfigError, DType, EngineConfig, ModelConfig, WeightFormat
from .loader import load_weights
from .models.decoder import Decoder
from .runner import PREFILL_CHUNK, Session
from .sampling import Sampler, SamplingParams
from .tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer

Prompt = str | Sequence[int]
FinishReason = Literal["stop", "length"]
_DTYPES: dict[DType, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One new token, the text that became final with it, and, on the last one, why generation ended."""

    token_id: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Metrics:
    """Seconds on a monotonic clock: arrival of the request, its first token, its last."""

    arrival: float
    first_token: float
    finished: float


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """What was generated. `text` is empty where the model has no tokenizer; an end token is in `token_ids` only."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: Metrics
    finished: bool = True


def resolve_model(model: str | Path) -> Path:
    """The folder of a model: a path, or the name of the one that ships with the package, `tiny`."""
    if str(model) == "tiny":
        return Path(str(files("grok_engine") / "assets" / "tiny"))
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ConfigError(f"model {str(model)!r} is not a folder: expected 'tiny' or the path of a checkpoint")
    return path


class LLM:
    """A decoder loaded from `model`: `tiny`, or a folder that holds a release's `ckpt-0`.

    dtype: of the computation, bfloat16 or float32. weights: None keeps what the checkpoint holds (the release's int8,
    bit for bit), bf16 or fp32 dequantise while loading. max_model_len: tokens of a request in all, by default the
    model's own. Loading shows a progress bar on a terminal. Bad values raise ConfigError, a ValueError; a folder that
    does not hold the model raises CheckpointError with everything that is wrong in it.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        *,
        dtype: DType | torch.dtype = "bfloat16",
        device: str = "cpu",
        weights: WeightFormat | None = None,
        max_model_len: int | None = None,
        page_size: int = 16,
    ) -> None:
        path = resolve_model(model)
        if isinstance(dtype, torch.dtype):
            dtype = cast("DType", str(dtype).removeprefix("torch."))  # EngineConfig refuses the others by name
        self.config = EngineConfig(
            model=ModelConfig.from_pretrained(path),
            dtype=dtype,
            device=device,
            weights=weights,
            max_model_len=-1 if max_model_len is None else max_model_len,
            page_size=page_size,
        )
        self.tokenizer: Tokenizer | None = load_tokenizer(path)
        checkpoint = XaiCheckpoint(path, self.config.model)
        self.model = Decoder(self.config.model, _DTYPES[dtype], _device(device), self.config.max_model_len)
        columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=checkpoint.total_bytes)
            load_weights(
                self.model, checkpoint, weights=weights, progress=lambda done, total: bar.update(task, completed=done)
            )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked: text needs a tokenizer, ids must be in the vocabulary, and it must fit."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"prompt {prompt[:40]!r} is text, but the model has no tokenizer: give token ids")
            token_ids = self.tokenizer.encode(prompt)
        else:
            token_ids = [int(t) for t in prompt]
        if not token_ids:
            raise ValueError(f"prompt {prompt!r} is empty: expected at least one token")
        vocab, longest = self.config.model.vocab_size, self.config.max_model_len
        for t in token_ids:
            if not 0 <= t < vocab:
                raise ValueError(f"token id {t} is not in the vocabulary: expected 0..{vocab - 1}")
        if len(token_ids) > longest:
            raise ValueError(f"prompt has {len(token_ids)} tokens, expected at most max_model_len={longest}")
        return token_ids

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], *, chunk: int = PREFILL_CHUNK) -> Tensor:
        """logits_TV in fp32 after each of the tokens. `chunk` tokens go through the model at once."""
        if chunk < 1:
            raise ValueError(f"chunk={chunk} is not a positive integer")
        ids = self.encode(token_ids)
        session = Session(self.model, len(ids), self.config.page_size)
        return torch.cat([self.model.logits(x_TD) for x_TD in session.feed(ids, chunk)])

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Generate token by token. The prompt is checked at the call, not at the first token."""
        return self._stream(self._prompt(prompt), params or SamplingParams())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Finish every prompt, text or token ids, one after the other. Nothing runs unless all of them are valid."""
        requests = _as_requests(prompts)
        if isinstance(sampling_params, Sequence):
            params = list(sampling_params)
            if len(params) != len(requests):
                raise ValueError(f"{len(params)} sampling_params for {len(requests)} prompts: expected as many, or one")
        else:
            params = [sampling_params or SamplingParams()] * len(requests)
        checked = [self._prompt(prompt) for prompt in requests]
        return [self._finish(i, *request) for i, request in enumerate(zip(requests, checked, params, strict=True))]

    def _prompt(self, prompt: Prompt) -> list[int]:
        token_ids = self.encode(prompt)
        if len(token_ids) == self.config.max_model_len:
            raise ValueError(f"prompt has {len(token_ids)} tokens, all of max_model_len: no room for a new one")
        return token_ids

    def _finish(self, index: int, prompt: Prompt, prompt_ids: list[int], params: SamplingParams) -> RequestOutput:
        arrival = first = time.monotonic()
        chunks: list[StreamChunk] = []
        for chunk in self._stream(prompt_ids, params):
            if not chunks:
                first = time.monotonic()
            chunks.append(chunk)
        reason = chunks[-1].finish_reason
        assert reason is not None
        output = CompletionOutput("".join(c.text for c in chunks), [c.token_id for c in chunks], reason)
        metrics = Metrics(arrival, first, time.monotonic())
        return RequestOutput(str(index), prompt if isinstance(prompt, str) else None, prompt_ids, [output], metrics)

    def _stream(self, prompt_ids: list[int], params: SamplingParams) -> Iterator[StreamChunk]:
        room = min(params.max_tokens, self.config.max_model_len - len(prompt_ids))
        session = Session(self.model, len(prompt_ids) + room, self.config.page_size)
        sampler = Sampler(params)
        detokenizer = IncrementalDetokenizer(self.tokenizer) if self.tokenizer else None
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends.update(self.config.model.eos_token_ids)
        fed = prompt_ids
        for left in range(room - 1, -1, -1):
            for x_TD in session.feed(fed):
                last_1D = x_TD[-1:]
            with torch.inference_mode():
                token = sampler(self.model.logits(last_1D)[0])
            reason: FinishReason | None = "stop" if token in ends else None if left else "length"
            text = ""
            if detokenizer:
                text = detokenizer.push(token) if token not in ends else ""
                text += detokenizer.finish() if reason else ""
            yield StreamChunk(token, text, reason)
            if reason:
                return
            fed = [token]


def _as_requests(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list; arrays and tensors count as the lists they hold."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts.tolist() if hasattr(prompts, "tolist") else prompts)
    return [items] if items and isinstance(items[0], Integral) else items


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name!r} cannot be used: {reason}") from None
    return device
