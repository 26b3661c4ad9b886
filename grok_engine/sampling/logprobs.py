"""Log-probabilities of tokens, and the most probable tokens beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PART = 64  # rows of a prompt at once: bounds the logits in memory; a row's values are the same in any part


class TokenLogprobs(NamedTuple):
    """One token's log-probability and rank, and the most probable tokens as (token, log-probability, rank).

    A rank is 1 + the number of more probable tokens. Tokens of equal probability have one rank and are listed by id.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float, int]]


def token_logprobs(logits_RV: Tensor, token_ids: Sequence[int], numbers: Sequence[int]) -> list[TokenLogprobs]:
    """log_softmax(logits) at `token_ids`, one a row, with the `numbers` most probable tokens of each row (−1: all)."""
    vocab, logprobs_RV = logits_RV.shape[1], _log_softmax(logits_RV)
    counts = [vocab if n == -1 else min(n, vocab) for n in numbers]
    chosen_R1 = logprobs_RV.gather(1, to_device(np.array(token_ids, np.int64), logits_RV)[:, None])
    ranks_R = (logprobs_RV > chosen_R1).sum(-1, dtype=torch.int32) + 1
    tops: list[list[tuple[int, float, int]]] = [[] for _ in counts]
    if most := max(counts):
        # only the values of topk are used: it does not define the order of equals
        values_RK = logprobs_RV.topk(most).values
        last_R = to_device(np.maximum(np.array(counts, np.int64) - 1, 0), logits_RV)
        least_R = torch.where(
            to_device(np.array(counts) > 0, logits_RV), values_RK.gather(1, last_R[:, None])[:, 0], torch.inf
        )
        kept_RV = logprobs_RV >= least_R[:, None]
        places = kept_RV.nonzero()
        at = places.cpu().numpy(), logprobs_RV[places[:, 0], places[:, 1]].cpu().numpy()
        order = np.lexsort((at[0][:, 1], -at[1], at[0][:, 0]))
        for row, token, value in zip(*at[0][order].T.tolist(), at[1][order].tolist(), strict=True):
            if len(top := tops[row]) < counts[row]:
                top.append((token, value, top[-1][2] if top and top[-1][1] == value else len(top) + 1))
    return [TokenLogprobs(*t) for t in zip(chosen_R1[:, 0].tolist(), ranks_R.tolist(), tops, strict=True)]


def chosen_logprobs(x_TD: Tensor, token_ids: Sequence[int], logits: Callable[[Tensor], Tensor]) -> Tensor:
    """(T,) fp32: log_softmax(logits)[t, token_ids[t]]. logits: hidden states to fp32 logits."""
    assert len(token_ids) == len(x_TD), f"{len(token_ids)} token_ids for {len(x_TD)} rows"
    ids_T1 = to_device(np.array(token_ids, np.int64), x_TD)[:, None]
    parts = (slice(t, t + PART) for t in range(0, len(token_ids), PART))
    scores = [_log_softmax(logits(x_TD[part])).gather(1, ids_T1[part])[:, 0] for part in parts]
    return torch.cat(scores) if scores else torch.empty(0, device=x_TD.device)


def prompt_logprobs(
    x_TD: Tensor, token_ids: Sequence[int], number: int, logits: Callable[[Tensor], Tensor]
) -> Iterator[TokenLogprobs]:
    """Those of part of a prompt: `token_ids[t]` is the token after row t. logits: hidden states to fp32 logits."""
    assert len(token_ids) == len(x_TD), f"{len(token_ids)} token_ids for {len(x_TD)} rows"
    for t in range(0, len(token_ids), PART):
        part = token_ids[t : t + PART]
        yield from token_logprobs(logits(x_TD[t : t + PART]), part, [number] * len(part))


def _log_softmax(logits_RV: Tensor) -> Tensor:
    vocab = logits_RV.shape[1]
    if vocab % 16:  # unaligned rows: a GPU's softmax adds in an order that depends on where a row begins
        logits_RV = torch.nn.functional.pad(logits_RV, (0, -vocab % 16), value=float("-inf"))
    return torch.log_softmax(logits_RV, -1)[:, :vocab]


def to_device(array: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    """A tensor of the array's values on the device of `like`, without waiting for it."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=True)
