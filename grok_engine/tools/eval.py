"""Perplexity of a text, in overlapping windows."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from grok_engine.config import shown
from grok_engine.llm import LLM
from grok_engine.tokenizer.base import Tokenizer

MAX_BYTES = 64 << 20  # of a text: its tokens are in memory, at about 100 bytes each while it is encoded
CONTEXT = 1024  # as transformers' guide on perplexity, whose stride is half of it too

Progress = Callable[[int, int], None]  # windows done, and in all


class Window(NamedTuple):
    """Tokens start … stop − 1 go through the model, and those from `scored_from` on are scored."""

    start: int
    scored_from: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model makes of a text. Nats, and one error: the standard error of the mean, taking windows as independent.

    scored_bytes: UTF-8 of the scored tokens, without BOS all of the text but its first token. window_nats and
    window_tokens: −Σ log p of each window's scored tokens, and how many these are, to compare two runs in pairs.
    """

    model: str
    dtype: str
    device: str
    weights: str
    head: str
    activations: str
    kv: str
    text_bytes: int
    text_sha256: str
    tokens: int
    bos: bool
    context: int
    stride: int
    scored_tokens: int
    scored_bytes: int
    seconds: float
    window_nats: tuple[float, ...]
    window_tokens: tuple[int, ...]

    @property
    def nats_per_token(self) -> float:
        return math.fsum(self.window_nats) / self.scored_tokens

    @property
    def standard_error(self) -> float:
        """Of nats_per_token; NaN for one window."""
        return _standard_error(self.window_nats, self.window_tokens)

    @property
    def perplexity(self) -> float:
        """exp(nats_per_token), infinite where fp64 does not hold it."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return math.fsum(self.window_nats) / math.log(2) / self.scored_bytes

    def minus(self, other: Evaluation) -> tuple[float, float]:
        """Nats per token more than `other` of the same windows, and the standard error of that difference."""
        mine, theirs = ((e.text_sha256, e.tokens, e.bos, e.context, e.stride) for e in (self, other))
        if mine != theirs:
            raise ValueError(f"evaluations of {mine} and of {theirs}: expected the same text, tokens and windows")
        nats = [a - b for a, b in zip(self.window_nats, other.window_nats, strict=True)]
        return math.fsum(nats) / self.scored_tokens, _standard_error(nats, self.window_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Every field, and what is computed of them; None for what is no number."""
        names = ("perplexity", "nats_per_token", "standard_error", "bits_per_byte")
        results = {name: getattr(self, name) for name in names}
        return {k: v if math.isfinite(v) else None for k, v in results.items()} | asdict(self)

    def lines(self) -> Iterator[tuple[str, str]]:
        """What to print, as names and values."""
        error, nats = self.standard_error, self.nats_per_token
        first = "" if self.bos else " but the first"
        yield "model", f"{self.model}, {self.dtype} on {self.device}"
        yield (
            "formats",
            f"weights {self.weights}, head {self.head}, activations {self.activations}, keys and values {self.kv}",
        )
        yield "text", f"{self.text_bytes:,} bytes, sha256 {self.text_sha256[:16]}"
        yield "tokens", f"{self.tokens:,}, {'BOS in front' if self.bos else 'no BOS'}; every one{first} scored once"
        if self.stride == self.context:
            yield "", "but the first of each window, which has nothing before it"
        yield "windows", f"{len(self.window_nats):,} of {self.context} tokens, one every {self.stride}"
        if math.isnan(error):
            yield "standard error", "unknown: one window does not show it"
        for name, value, digits in (
            ("perplexity", self.perplexity, 4),
            ("nats per token", nats, 5),
            ("bits per byte", self.bits_per_byte, 5),
        ):
            spread = value * error if name == "perplexity" else value / nats * error if nats else 0.0
            yield name, f"{value:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")
        yield "speed", f"{self.seconds:.1f} s, {self.scored_tokens / self.seconds:,.0f} scored tokens/s"


def read_text(path: str) -> str:
    """The text of a file, or of standard input for "-", its line ends as they are. ValueError if it is not UTF-8, holds
    a NUL, is empty, or has more than MAX_BYTES."""
    if path == "-":
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    else:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes: expected a part of it")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {data[error.start]:#04x} at {error.start:,}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has a NUL at character {text.index(chr(0)):,}")
    if not text:
        raise ValueError(f"{path} is empty: expected text")
    return text


def windows(tokens: int, context: int, stride: int) -> list[Window]:
    """Windows of `context` tokens, one every `stride`, the last one shorter. Each scores what none before it has
    scored, but nothing that has no token before it in its window."""
    found = [Window(0, 1, min(context, tokens))]
    while found[-1].stop < tokens:
        last = found[-1]
        start = last.start + stride
        found.append(Window(start, max(last.stop, start + 1), min(start + context, tokens)))
    return [w for w in found if w.scored_from < w.stop]


def evaluate(
    llm: LLM,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score `text`, or its first `limit` tokens, in windows of `context` tokens, one every `stride`.

    context: by default 1024, or max_model_len if that is less; stride: by default half of it. bos: whether BOS goes in
    front of the text, once; by default as the model's files have it for prompts. Windows after the first begin
    in mid-text, without BOS. Control tokens spelled out in the text are text. ValueError for a text of fewer than two
    tokens, for windows that the model does not take, and without a tokenizer.
    """
    tokenizer, config = llm.tokenizer, llm.config
    if tokenizer is None:
        raise ValueError(f"{config.model.name} has no tokenizer: expected a model that comes with one")
    context = min(CONTEXT, config.max_len) if context is None else context
    stride = max(context // 2, 1) if stride is None else stride
    if not 2 <= context <= config.max_len:
        raise ValueError(f"context={shown(context)} is not in 2..max_model_len={config.max_len}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride={shown(stride)} is not in 1..context={context}: tokens would be left out")
    if limit is not None and limit < 2:
        raise ValueError(f"limit={shown(limit)} is less than two tokens")
    before = prefix(tokenizer) if bos is None else [tokenizer.bos_token_id] if bos else []
    if None in before:
        raise ValueError(f"bos={bos}, but the tokenizer has no BOS token")
    ids = [*before, *tokenizer.encode(text)][:limit]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, expected at least two: the first is not scored")
    found = windows(len(ids), context, stride)
    sizes = list(_sizes(tokenizer, ids))
    read = len(text.encode()) if limit is None else sum(sizes)  # the tokenizer may normalise the text
    scored_bytes = read - sum(sizes) + sum(sum(sizes[w.scored_from : w.stop]) for w in found)
    nats: list[float] = []
    began = time.monotonic()
    for window in found:
        scores = llm.score(ids[window.start : window.stop], first=window.scored_from - window.start)
        nats.append(-float(scores.double().sum()))
        if progress:
            progress(len(nats), len(found))
    return Evaluation(
        model=config.model.name, dtype=config.dtype, device=config.device, weights=config.weights or "as stored",
        head=config.head or "by default", activations=config.activations or "none", kv=str(config.kv_dtype),
        text_bytes=len(text.encode()),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(), tokens=len(ids), bos=bool(before), context=context,
        stride=stride, scored_tokens=sum(w.stop - w.scored_from for w in found), scored_bytes=scored_bytes,
        seconds=time.monotonic() - began, window_nats=tuple(nats),
        window_tokens=tuple(w.stop - w.scored_from for w in found),
    )  # fmt: skip


def prefix(tokenizer: Tokenizer) -> list[int]:
    """What the model's files put in front of a prompt: BOS, or nothing."""
    return list(tokenizer.prefix)


def _sizes(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[int]:
    """Bytes of the text of each token."""
    at_start = True
    for token in ids:
        text, data, _, at_start = tokenizer.surface(token, at_start)
        yield len(data) or len(text.encode())


def _standard_error(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """Of Σ nats / Σ tokens, a ratio of means over the windows."""
    count, total = len(nats), sum(tokens)
    if count < 2:
        return math.nan
    mean = math.fsum(nats) / total
    squares = math.fsum((x - mean * n) ** 2 for x, n in zip(nats, tokens, strict=True))
    return math.sqrt(count / (count - 1) * squares) / total
