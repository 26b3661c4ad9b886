"""Logits to tokens, for a batch of sequences. `SamplingParams` defines the steps and their order.

A row's token and log-probabilities depend, bit for bit, on its own logits and history alone. So every step is
elementwise, or exact in any order (a maximum, a comparison, a count), or a reduction along one contiguous row whose
order does not depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

import grok_kernels
from grok_engine.config import described
from grok_engine.log import QuietLogger

from .logprobs import TokenLogprobs, to_device, token_logprobs
from .rules import Ints
from .state import SamplingState

logger = QuietLogger(__name__)

FEW = 2048  # entries of a logit_bias: for more, adding a row of the whole vocabulary takes less time


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of one row, with log-probabilities if the request asks for them; or an error, and token −1."""

    token: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@torch.inference_mode()
def sample(rows: Sequence[SamplingState], logits_BV: Tensor) -> list[Sampled]:
    """One token a row, which the row has accepted. logits_BV: fp32, one row a sequence, not modified.

    A row without a usable logit (NaN, +inf, all masked), or whose processor or grammar fails, returns its error and
    accepts nothing; other rows are not affected.
    """
    if not rows:
        return []
    if logits_BV.dim() != 2 or logits_BV.shape[0] != len(rows) or logits_BV.dtype != torch.float32:
        raise ValueError(
            f"logits have shape {tuple(logits_BV.shape)} of {logits_BV.dtype}, expected ({len(rows)}, V) of float32"
        )
    errors: dict[int, str] = {}
    edited, drawn = any(row.edits for row in rows), [i for i, row in enumerate(rows) if not row.greedy]
    if edited or drawn:
        x_BV, best_B = logits_BV, logits_BV.amax(-1)
        _find_bad(best_B.tolist(), errors, "the model's logits")
        if edited:
            x_BV = logits_BV.clone()
            _edit(rows, x_BV, errors)
            best_B = x_BV.amax(-1)
            _find_bad(best_B.tolist(), errors, "the logits left to choose from")
        tokens = _choose(rows, x_BV, best_B, [i for i in drawn if i not in errors])
    else:
        bests, tokens = _largest(logits_BV)
        _find_bad(bests, errors, "the model's logits")
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
        Sampled(-1, error=errors[i]) if i in errors else Sampled(tokens[i], logprobs.get(i)) for i in range(len(rows))
    ]


def _edit(rows: Sequence[SamplingState], x_BV: Tensor, errors: dict[int, str]) -> None:
    """Steps 1 to 4 in place, each as a few operations over all rows that need it."""
    good = [(i, row) for i, row in enumerate(rows) if row.edits and i not in errors]
    for i, row in good:
        if row.params.logits_processors:
            try:
                x_BV[i] = _processed(row, x_BV[i].clone())
            except (KeyboardInterrupt, SystemExit):  # for the program, not for this request
                raise
            except BaseException as error:  # a user's code: what it raises, CancelledError too, ends its own request
                errors[i] = f"logits processor: {described(error)}"
                logger.warning("a logits processor failed", exc_info=error)

    if biased := [(i, *row.rules.bias) for i, row in good if 0 < len(row.rules.bias[0]) <= FEW]:
        x_BV[_places([(i, ids) for i, ids, _ in biased], x_BV)] += to_device(
            np.concatenate([b for *_, b in biased]), x_BV
        )
    for i, row in good:
        if len(row.rules.bias[0]) > FEW:
            x_BV[i] += row.rules.whole_bias(x_BV.device)

    if penalised := [(i, row.params, *row.counts.ids_and_counts()) for i, row in good if row.counts is not None]:
        at = _places([(i, ids) for i, _, ids, _ in penalised], x_BV)
        counts = to_device(np.concatenate([counts for *_, counts in penalised]), x_BV)
        each = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, p, _, _ in penalised]
        spread = np.repeat(np.array(each, np.float32), [len(ids) for _, _, ids, _ in penalised], axis=0)
        repetition, frequency, presence = to_device(spread, x_BV).unbind(1)
        values = x_BV[at]
        values = torch.where(values > 0, values / repetition, values * repetition)
        x_BV[at] = values - frequency * counts - presence * (counts > 0)

    if banned := [(i, ids) for i, row in good if len(ids := row.banned())]:
        x_BV[_places(banned, x_BV)] = float("-inf")
    masked, masks = [], []
    for i, row in good:
        if i in errors:
            continue
        try:
            mask = row.allowed()
        except ValueError as error:
            errors[i] = str(error)
            continue
        if mask is not None:
            masked.append(i)
            masks.append(mask)
    if masked:
        # each byte of a mask becomes the most that its eight logits may be
        most_RV = torch.nn.functional.embedding(to_device(np.stack(masks), x_BV).int(), _most(x_BV.device)).flatten(1)
        most_RV = most_RV[:, : x_BV.shape[1]]
        if len(masked) == len(rows):
            torch.minimum(x_BV, most_RV, out=x_BV)
        else:
            where = to_device(np.array(masked), x_BV)
            x_BV[where] = torch.minimum(x_BV[where], most_RV)


@cache
def _most(device: torch.device) -> Tensor:
    """(256, 8) fp32: +inf for each bit of a byte that is set, from the lowest on, and −inf for the others."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits, np.inf, -np.inf).astype(np.float32)).to(device)


def _choose(rows: Sequence[SamplingState], x_BV: Tensor, best_B: Tensor, drawn: list[int]) -> list[int]:
    """A token for every row: by random number in the rows `drawn` (steps 5 to 8), the largest logit in the others."""
    tokens = _largest(x_BV)[1] if len(drawn) < len(rows) else [-1] * len(rows)
    if drawn:
        params = [rows[i].params for i in drawn]
        x_RV, best_R = _take(x_BV, drawn), _take(best_B, drawn)
        floor_R = None
        if any(p.min_p for p in params):
            # p / p_max = exp((x − x_max) / temperature), so that no softmax is needed
            with np.errstate(all="ignore"):  # log(0), and products that fp32 rounds to 0 or −inf, mean what they say
                below = np.array([p.temperature for p in params]) * np.log([p.min_p for p in params])
                floor_R = best_R + to_device(below.astype(np.float32), x_BV)
        vocab = x_BV.shape[1]
        ks = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
        limited = [i for i, k in enumerate(ks) if k < vocab]
        if limited:
            index_L = to_device(np.array(limited), x_BV)
            last_L = to_device(np.array([ks[i] - 1 for i in limited]), x_BV)
            values_LK = _take(x_RV, limited).topk(max(ks[i] for i in limited)).values
            kth_L = values_LK.gather(1, last_L[:, None])[:, 0]
            floor_R = torch.full_like(best_R, float("-inf")) if floor_R is None else floor_R
            floor_R[index_L] = torch.maximum(floor_R[index_L], kth_L)
        if floor_R is not None:
            x_RV = x_RV.masked_fill(x_RV < floor_R[:, None], float("-inf"))
        draw = [[p.temperature for p in params], [p.top_p for p in params], [rows[i].uniform() for i in drawn]]
        drawn_R = grok_kernels.sample_top_p(x_RV, *to_device(np.array(draw, np.float32), x_BV))
        for i, token in zip(drawn, drawn_R.tolist(), strict=True):
            tokens[i] = int(token)
    return tokens


def _largest(x_BV: Tensor) -> tuple[list[float], list[int]]:
    """The largest logit of each row (NaN if the row has one), and the first token that has it."""
    if x_BV.device.type == "cpu":  # numpy takes a tenth of torch's time
        values = x_BV.detach().numpy()
        tokens = values.argmax(-1)
        return values[np.arange(len(tokens)), tokens].tolist(), tokens.tolist()
    # fp64 holds both exactly, so that one transfer is enough
    bests, chosen = torch.stack([x_BV.amax(-1).double(), x_BV.argmax(-1).double()]).tolist()
    return bests, [int(t) for t in chosen]


def _processed(row: SamplingState, logits_V: Tensor) -> Tensor:
    for processor in row.params.logits_processors:
        shape = logits_V.shape
        logits_V = processor(list(row.output_ids), logits_V)
        if not isinstance(logits_V, Tensor) or logits_V.shape != shape or not logits_V.is_floating_point():
            what = f"{tuple(logits_V.shape)} {logits_V.dtype}" if isinstance(logits_V, Tensor) else repr(logits_V)
            raise TypeError(f"returned {what}, expected {tuple(shape)} of a floating type")
    return logits_V


def _find_bad(bests: Sequence[float], errors: dict[int, str], what: str) -> None:
    """Add an error for each row whose largest logit is not finite."""
    for i, best in enumerate(bests):
        if not -float("inf") < best < float("inf") and i not in errors:
            has = "have +inf" if best > 0 else "are all -inf: no token can follow" if best < 0 else "have NaN"
            errors[i] = f"{what} {has}"


def _places(parts: Sequence[tuple[int, Ints]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of some logits, from each row and its columns."""
    rows = np.repeat(np.array([i for i, _ in parts]), [len(ids) for _, ids in parts])
    return to_device(rows, like), to_device(np.concatenate([ids for _, ids in parts]), like)


def _take(x: Tensor, rows: list[int]) -> Tensor:
    return x if len(rows) == x.shape[0] else x[to_device(np.array(rows, np.int64), x)]
