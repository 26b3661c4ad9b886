"""Logits to tokens, for many requests at once. `SamplingParams` says in which order and what each step means.

A row's token and log-probabilities depend, bit for bit, on its own logits and history. So every step is elementwise,
or exact whatever the order (a maximum, a comparison, a count), or a reduction along one contiguous row whose order
does not depend on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import grok_kernels

from .params import Patterns, SamplingParams, uniform

Ints = npt.NDArray[np.int64]
_NOTHING: Ints = np.empty(0, np.int64)


class Matcher(Protocol):
    """What a structured output allows next. Both raise ValueError where it cannot be said."""

    def allowed(self) -> npt.NDArray[np.uint8]:
        """One bit a token, from the lowest bit of the first byte on; tokens beyond the last byte are not allowed."""

    def accept(self, token_id: int) -> None: ...


class TokenLogprobs(NamedTuple):
    """Of one token: its log-probability, its rank (1 is the most probable), and the most probable tokens with theirs.

    Equal ones are listed by their ids.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of one row, with its log-probabilities if they were asked for; or an error, and then token is -1."""

    token: int
    logprob: float | None = None
    rank: int | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    error: str | None = None


class TokenCounts:
    """The different tokens of a sequence in order of appearance, with how often each stands in its output."""

    def __init__(self, prompt: Iterable[int]) -> None:
        ids = list(dict.fromkeys(prompt))
        self._place = {token: i for i, token in enumerate(ids)}
        self._ids: Ints = np.array(ids, np.int64)
        self._counts = np.zeros(len(ids), np.float32)

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):  # grown by half, so that a token costs the same however long the output
            more = place // 2 + 16
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])
        self._ids[place] = token
        self._counts[place] += 1

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ids(self) -> Ints:
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        return self._counts[: len(self._place)]


class SequenceSampler:
    """The sampling state of one sequence: what it has generated and what follows from that.

    seed: of the request, `fresh_seed(params)`; index: which of its n sequences this is. bad_words: as token ids, of
    `bad_word_tokens`. output: tokens that were generated before, as where a sequence moves to another engine.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        index: int = 0,
        prompt: Iterable[int] = (),
        eos_token_ids: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        matcher: Matcher | None = None,
        output: Iterable[int] = (),
    ) -> None:
        p = self.params = params
        self.seed, self.index, self.matcher = seed, index, matcher
        self.output: list[int] = []
        self.greedy = p.greedy
        self._bias = _split(p.logit_bias)
        self._allowed = None if p.allowed_token_ids is None else _ids(set(p.allowed_token_ids))
        self._ends = _ids(p.end_token_ids(eos_token_ids)) if p.min_tokens else _NOTHING
        penalised = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)
        self._counts = TokenCounts(prompt if p.repetition_penalty != 1 else ()) if penalised else None
        words = [tuple(word) for word in bad_words]
        assert all(words), "a bad word without tokens would ban nothing, or everything"
        self._words = Patterns([word[:-1] for word in words]) if words else None
        self._last_tokens = [word[-1] for word in words]
        self._state = 0
        self._edits = bool(
            p.logits_processors or p.logit_bias or penalised or words or p.min_tokens or matcher
        ) or (self._allowed is not None)  # fmt: skip
        for token in output:
            self.accept(token)

    @property
    def edits(self) -> bool:
        """Whether its logits are changed before the choice."""
        return self._edits

    def accept(self, token: int) -> None:
        """Take `token` as generated. `sample` does this itself."""
        if self.matcher is not None:
            self.matcher.accept(token)
        self.output.append(token)
        if self._counts is not None:
            self._counts.add(token)
        if self._words is not None:
            self._state = self._words.step(self._state, token)

    def uniform(self) -> float:
        """The random number of the next token."""
        return uniform(self.seed, self.index, len(self.output))

    def banned(self) -> Ints:
        """Tokens that must not come next: the last ones of bad words, and end tokens before min_tokens."""
        banned = self._ends if len(self.output) < self.params.min_tokens else _NOTHING
        if self._words is not None and (found := self._words.found[self._state]):
            banned = np.array([*banned, *(self._last_tokens[i] for i in found)], np.int64)
        return banned


def sample(rows: Sequence[SequenceSampler], logits_BV: Tensor) -> list[Sampled]:
    """One token a row, each accepted by its row. logits_BV: fp32, one row a sequence, left as it is.

    A row without a usable logit (NaN, +inf, all masked), or whose processor or grammar fails, comes back with its
    error, nothing accepted; the others do not notice.
    """
    if logits_BV.dim() != 2 or logits_BV.shape[0] != len(rows) or logits_BV.dtype != torch.float32:
        raise ValueError(
            f"logits have shape {tuple(logits_BV.shape)} of {logits_BV.dtype}, expected ({len(rows)}, V) of float32"
        )
    if not rows:
        return []
    errors: dict[int, str] = {}
    x_BV = logits_BV
    if any(row.edits for row in rows):
        _find_bad(logits_BV.amax(-1), errors, "the model's logits")
        x_BV = logits_BV.clone()
        _edit(rows, x_BV, errors)
        best_B = x_BV.amax(-1)
        _find_bad(best_B, errors, "the logits left to choose from")
        drawn = [i for i, row in enumerate(rows) if not row.greedy and i not in errors]
        tokens = _choose(rows, x_BV, best_B, drawn)
    else:
        drawn = [i for i, row in enumerate(rows) if not row.greedy]
        if drawn:  # what may hold NaN is not handed on
            best_B = logits_BV.amax(-1)
            _find_bad(best_B, errors, "the model's logits")
            drawn = [i for i in drawn if i not in errors]
            tokens = _choose(rows, x_BV, best_B, drawn)
        else:
            bests, tokens = _largest(x_BV)
            _name_bad(bests, errors, "the model's logits")
    for i, row in enumerate(rows):
        if i not in errors:
            try:
                row.accept(tokens[i])
            except ValueError as error:
                errors[i] = str(error)
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and i not in errors]
    logprobs: dict[int, TokenLogprobs] = {}
    if asked:
        numbers = [rows[i].params.logprobs or 0 for i in asked]
        found = token_logprobs(_take(logits_BV, asked), [tokens[i] for i in asked], numbers)
        logprobs = dict(zip(asked, found, strict=True))
    return [
        Sampled(-1, error=errors[i]) if i in errors
        else Sampled(tokens[i], *logprobs[i]) if i in logprobs
        else Sampled(tokens[i])
        for i in range(len(rows))
    ]  # fmt: skip


def token_logprobs(logits_RV: Tensor, token_ids: Sequence[int], numbers: Sequence[int]) -> list[TokenLogprobs]:
    """log_softmax(logits) at `token_ids`, one a row, with the `numbers` most probable tokens (-1: all)."""
    vocab = logits_RV.shape[1]
    if vocab % 16:  # unaligned rows: a GPU's softmax adds in an order that depends on where a row begins
        logits_RV = torch.nn.functional.pad(logits_RV, (0, -vocab % 16), value=float("-inf"))
    logprobs_RV = torch.log_softmax(logits_RV, -1)[:, :vocab]
    counts = [vocab if n == -1 else min(n, vocab) for n in numbers]
    chosen_R1 = logprobs_RV.gather(1, _to(np.array(token_ids, np.int64), logits_RV)[:, None])
    ranks_R = (logprobs_RV > chosen_R1).sum(-1, dtype=torch.int32) + 1
    tops: list[list[tuple[int, float]]] = [[] for _ in counts]
    if most := max(counts):
        # Only the values are taken from topk, which says nothing about the order of equals.
        values_RK = logprobs_RV.topk(most).values
        last_R = _to(np.maximum(np.array(counts, np.int64) - 1, 0), logits_RV)
        least_R = torch.where(
            _to(np.array(counts) > 0, logits_RV), values_RK.gather(1, last_R[:, None])[:, 0], torch.inf
        )
        kept_RV = logprobs_RV >= least_R[:, None]
        places = kept_RV.nonzero()
        at = places.cpu().numpy(), logprobs_RV[places[:, 0], places[:, 1]].cpu().numpy()
        order = np.lexsort((at[0][:, 1], -at[1], at[0][:, 0]))
        for row, token, value in zip(*at[0][order].T.tolist(), at[1][order].tolist(), strict=True):
            if len(tops[row]) < counts[row]:
                tops[row].append((token, value))
    return [TokenLogprobs(*t) for t in zip(chosen_R1[:, 0].tolist(), ranks_R.tolist(), tops, strict=True)]


def prompt_logprobs(logits_TV: Tensor, token_ids: Sequence[int], number: int = 0) -> list[TokenLogprobs]:
    """Of the tokens of a prompt, or of a part of it: `token_ids[t]` is the one that follows the row t of the logits."""
    if len(token_ids) != logits_TV.shape[0]:
        raise ValueError(f"{len(token_ids)} token_ids for {logits_TV.shape[0]} rows of logits: expected as many")
    step = 64  # bounds the memory; a row's values are the same in any part
    return [
        item
        for t in range(0, len(token_ids), step)
        for item in token_logprobs(
            logits_TV[t : t + step].float(), token_ids[t : t + step], [number] * len(token_ids[t : t + step])
        )
    ]


def _edit(rows: Sequence[SequenceSampler], x_BV: Tensor, errors: dict[int, str]) -> None:
    """Steps 1 to 4, in place: a few operations on the logits for all of the rows that need one."""
    good = [(i, row) for i, row in enumerate(rows) if row.edits and i not in errors]
    for i, row in good:
        if row.params.logits_processors:
            try:
                x_BV[i] = _processed(row, x_BV[i].clone())
            except Exception as error:  # a user's code: whatever it raises is its own request's affair
                errors[i] = f"logits processor: {type(error).__name__}: {error}"

    if at := _flat([(i, row._bias[0], (row._bias[1],)) for i, row in good if len(row._bias[0])], x_BV):
        x_BV[at.where] += at.values[0]

    penalised = [(i, row) for i, row in good if row._counts is not None and len(row._counts)]
    counted = [(i, row._counts.ids, (row._counts.counts,)) for i, row in penalised if row._counts is not None]
    if at := _flat(counted, x_BV):
        each = [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in (r.params for _, r in penalised)
        ]
        spread = np.repeat(np.array(each, np.float32), [len(ids) for _, ids, _ in counted], axis=0)
        repetition, frequency, presence = _to(spread, x_BV).unbind(1)
        values, counts = x_BV[at.where], at.values[0]
        values = torch.where(values > 0, values / repetition, values * repetition)
        x_BV[at.where] = values - frequency * counts - presence * (counts > 0)

    if at := _flat([(i, row._allowed, ()) for i, row in good if row._allowed is not None], x_BV):
        values = x_BV[at.where]
        x_BV[_to(np.array([i for i, row in good if row._allowed is not None]), x_BV)] = float("-inf")
        x_BV[at.where] = values
    if at := _flat([(i, ids, ()) for i, row in good if len(ids := row.banned())], x_BV):
        x_BV[at.where] = float("-inf")

    masked, masks = [], []
    for i, row in good:
        if row.matcher is not None and i not in errors:
            try:
                masks.append(_fitted(row.matcher.allowed(), x_BV.shape[1]))
                masked.append(i)
            except ValueError as error:
                errors[i] = str(error)
    if masked:
        bits_RWb = (
            _to(np.stack(masks), x_BV)[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=x_BV.device)
        ) & 1
        refused_RV = bits_RWb.flatten(1)[:, : x_BV.shape[1]] == 0
        if len(masked) == len(rows):
            x_BV.masked_fill_(refused_RV, float("-inf"))
        else:
            where = _to(np.array(masked), x_BV)
            x_BV[where] = x_BV[where].masked_fill(refused_RV, float("-inf"))


def _choose(rows: Sequence[SequenceSampler], x_BV: Tensor, best_B: Tensor, drawn: list[int]) -> list[int]:
    """A token of every row: `drawn` by its random number (steps 5 to 8), the others the largest logit."""
    if len(drawn) < len(rows):
        tokens_B = torch.tensor(_largest(x_BV)[1], device=x_BV.device)
    if drawn:
        params = [rows[i].params for i in drawn]
        x_RV, best_R = _take(x_BV, drawn), _take(best_B, drawn)
        floor_R = None
        if any(p.min_p for p in params):
            # p / p_max = exp((x − x_max) / temperature), so that no softmax is needed
            with np.errstate(divide="ignore", over="ignore"):
                below = np.array([p.temperature for p in params]) * np.log([p.min_p for p in params])
            floor_R = best_R + _to(below.astype(np.float32), x_BV)
        vocab = x_BV.shape[1]
        ks = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
        limited = [i for i, k in enumerate(ks) if k < vocab]
        if limited:
            index_L = _to(np.array(limited), x_BV)
            last_L = _to(np.array([ks[i] - 1 for i in limited]), x_BV)
            values_LK = _take(x_RV, limited).topk(max(ks[i] for i in limited)).values
            kth_L = values_LK.gather(1, last_L[:, None])[:, 0]
            floor_R = torch.full_like(best_R, float("-inf")) if floor_R is None else floor_R
            floor_R[index_L] = torch.maximum(floor_R[index_L], kth_L)
        if floor_R is not None:
            x_RV = x_RV.masked_fill(x_RV < floor_R[:, None], float("-inf"))
        draw = [[p.temperature for p in params], [p.top_p for p in params], [rows[i].uniform() for i in drawn]]
        drawn_R = grok_kernels.sample_top_p(x_RV, *_to(np.array(draw, np.float32), x_BV))
        if len(drawn) == len(rows):
            tokens_B = drawn_R
        else:
            tokens_B[_to(np.array(drawn), x_BV)] = drawn_R
    return list(map(int, tokens_B.tolist()))


def _largest(x_BV: Tensor) -> tuple[list[float], list[int]]:
    """The largest logit of each row, NaN where there is one, and the first token that has it."""
    if x_BV.device.type == "cpu":  # numpy needs a tenth of torch's time
        values = x_BV.detach().numpy()
        tokens = values.argmax(-1)
        return values[np.arange(len(tokens)), tokens].tolist(), tokens.tolist()
    # in one transfer: fp64 holds both
    bests, chosen = torch.stack([x_BV.amax(-1).double(), x_BV.argmax(-1).double()]).tolist()
    return bests, [int(t) for t in chosen]


def _processed(row: SequenceSampler, logits_V: Tensor) -> Tensor:
    for processor in row.params.logits_processors:
        shape = logits_V.shape
        logits_V = processor(list(row.output), logits_V)
        if not isinstance(logits_V, Tensor) or logits_V.shape != shape or not logits_V.is_floating_point():
            what = f"{tuple(logits_V.shape)} {logits_V.dtype}" if isinstance(logits_V, Tensor) else repr(logits_V)
            raise TypeError(f"returned {what}, expected {tuple(shape)} of a floating type")
    return logits_V


def _find_bad(best_B: Tensor, errors: dict[int, str], what: str) -> None:
    _name_bad(best_B.tolist(), errors, what)


def _name_bad(bests: Sequence[float], errors: dict[int, str], what: str) -> None:
    for i, best in enumerate(bests):
        if not -float("inf") < best < float("inf") and i not in errors:
            has = (
                "are all -inf: no token can follow"
                if best == -float("inf")
                else f"have {'+inf' if best > 0 else 'NaN'}"
            )
            errors[i] = f"{what} {has}"


class _Places(NamedTuple):
    where: tuple[Tensor, Tensor]  # rows and columns
    values: list[Tensor]


def _flat(parts: Sequence[tuple[int, Ints, tuple[npt.NDArray[np.float32], ...]]], like: Tensor) -> _Places | None:
    """Places of a few logits of several rows, with numbers for each; None if there are none."""
    if not parts:
        return None
    columns = np.concatenate([ids for _, ids, _ in parts])
    rows = np.repeat(np.array([i for i, _, _ in parts], np.int64), [len(ids) for _, ids, _ in parts])
    values = [np.concatenate(arrays).astype(np.float32) for arrays in zip(*(v for _, _, v in parts), strict=True)]
    return _Places((_to(rows, like), _to(columns, like)), [_to(v, like) for v in values])


def _fitted(mask: npt.NDArray[np.uint8], vocab: int) -> npt.NDArray[np.uint8]:
    size = (vocab + 7) // 8
    return mask[:size] if len(mask) >= size else np.pad(mask, (0, size - len(mask)))


def _take(x: Tensor, rows: list[int]) -> Tensor:
    return x if len(rows) == x.shape[0] else x[_to(np.array(rows, np.int64), x)]


def _to(array: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=True)


def _ids(tokens: Collection[int]) -> Ints:
    return np.array(sorted(tokens), np.int64)


def _split(bias: object) -> tuple[Ints, npt.NDArray[np.float32]]:
    assert bias is None or isinstance(bias, dict)
    bias = bias or {}
    return np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)


def bad_word_tokens(words: Iterable[str], encode: Callable[[str], list[int]]) -> list[tuple[int, ...]]:
    """The token sequences of bad words: each as it is encoded at a start, after a space, and after another character.

    The last shows how a word goes on without a space: a tokenizer may put one before any text of its own accord.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        spellings = [encode(word), encode(" " + word)]
        for before in ("\n", "(", "."):
            alone, joined = encode(before), encode(before + word)
            if joined[: len(alone)] == alone:
                spellings.append(joined[len(alone) :])
        if not any(spellings):
            raise ValueError(f"bad_words has {word!r}, of which the tokenizer makes no token")
        found.update(dict.fromkeys(tuple(s) for s in spellings if s))
    return list(found)
