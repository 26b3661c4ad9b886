"""What a request's parameters mean on one model: built once a request, before any step, and shared by its n answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .automaton import Automaton
from .params import SamplingParams

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint8]  # one a token, from the lowest bit of the first byte on
FEW_BANS = 64


class SamplingRules:
    """The parameters, and what is made of them for a model. Nothing changes once it is built.

    bad_words: token sequences, from `bad_word_tokens`. prompt: token ids. ValueError if the parameters name a token
    that the vocabulary lacks.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        *,
        eos_token_ids: Collection[int] = (),
        bad_words: Iterable[Sequence[int]] = (),
        prompt: Iterable[int] = (),
    ) -> None:
        params.check_vocabulary(vocab_size)
        p, self.params, self.vocab_size = params, params, vocab_size
        self.ends = p.end_token_ids(eos_token_ids)
        self.stops = Automaton([(list(map(ord, stop)), stop) for stop in p.stop]) if p.stop else None
        bias = p.logit_bias or {}
        self.bias: tuple[Ints, Floats] = np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)
        self._whole_bias: Tensor | None = None
        penalised = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)
        # the distinct tokens that count before the first is generated, each with its place; None if none is counted
        repeated = dict.fromkeys(prompt) if p.repetition_penalty != 1 else ()
        self.counted = {token: i for i, token in enumerate(repeated)} if penalised else None
        bad = [tuple(word) for word in bad_words]
        never = [word[0] for word in bad if len(word) == 1]
        longer = [(word[:-1], word[-1]) for word in bad if len(word) > 1]
        self.bad_words = Automaton(longer) if longer else None  # last tokens, by those before them
        # What must never come next, and what must not while fewer than min_tokens are generated: places where they are
        # few; else, and where a grammar's mask is there to be joined, a bit for each token.
        early = [*never, *self.ends] if p.min_tokens else never
        few = p.allowed_token_ids is None and p.structured is None and len(early) <= FEW_BANS
        self.banned, self.banned_early = (np.array(ids if few else [], np.int64) for ids in (never, early))
        self.allowed, self.allowed_early = (
            None if few else self._bits(p.allowed_token_ids, ids) for ids in (never, early)
        )
        # whether logits are changed before the choice
        self.edits = penalised or bool(p.logits_processors or bias or bad or p.min_tokens or p.structured)
        self.edits |= p.allowed_token_ids is not None

    def _bits(self, allowed: Iterable[int] | None, banned: Collection[int]) -> Bits | None:
        """The tokens that may come next, or None for all of them."""
        if allowed is None and not banned:
            return None
        fits = np.full(self.vocab_size, allowed is None)
        if allowed is not None:
            fits[list(allowed)] = True
        fits[list(banned)] = False
        return np.packbits(fits, bitorder="little")

    def whole_bias(self, device: torch.device) -> Tensor:
        """(V,) fp32: `bias`, and 0 for the other tokens. Built at the first use and kept, for one device."""
        if self._whole_bias is None:
            ids, values = self.bias
            whole = np.zeros(self.vocab_size, np.float32)
            whole[ids] = values
            self._whole_bias = torch.from_numpy(whole).to(device)
        return self._whole_bias


def bad_word_tokens(words: Iterable[str], encode: Callable[[str], list[int]]) -> list[tuple[int, ...]]:
    """The token sequences of bad words: each as encoded at the start of a text, after a space, and inside a text.

    Inside: after punctuation, since a tokenizer may put a space before any text of its own.
    """
    found: dict[tuple[int, ...], None] = {}
    before = {text: encode(text) for text in ("\n", "(", ".")} if words else {}
    for word in dict.fromkeys(words):
        spellings = [encode(word), encode(" " + word)]
        for text, alone in before.items():
            joined = encode(text + word)
            if joined[: len(alone)] == alone:
                spellings.append(joined[len(alone) :])
        if not any(spellings):
            raise ValueError(f"bad_words has {word!r}, of which the tokenizer makes no token")
        found.update(dict.fromkeys(tuple(s) for s in spellings if s))
    return list(found)
