"""How a request samples its tokens: the parameters, and its random numbers."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from hashlib import blake2b
from typing import Any

from torch import Tensor

from grok_engine.config import is_int, is_number

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
_FLOAT32_MAX = 3.4028234663852886e38


class RequestOutputKind(Enum):
    """Outputs hold the whole text so far, only what is new in it, or come once, when the request is finished."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What the text must match: exactly one of a regex, a JSON schema (text or object) and a grammar.

    A regex matches the whole text and has no look-around; its `\\d` is a digit of any script, as in Python. A grammar
    is GBNF (`root ::= …`) or Lark (`start: …`).
    """

    regex: str | None = None
    json_schema: str | Mapping[str, Any] | bool | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"structured.{name}={value!r} is not text")
        if not isinstance(self.json_schema, (str, Mapping, bool, type(None))):
            raise ValueError(f"structured.json_schema={self.json_schema!r} is not an object, true, false or JSON text")
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            named = ", ".join(given) or "none"
            raise ValueError(f"structured has {named}: expected exactly one of regex, json_schema, grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How many tokens to generate, how to choose them, and where to stop. Names and meanings are vLLM's.

    A token is chosen from the logits in this order:

    1. `logits_processors`, in turn: `processor(tokens generated so far, logits_V) -> logits_V`, fp32
    2. `logit_bias` is added
    3. `repetition_penalty` r, on tokens of the prompt and the output: positive logits / r, the others · r;
       then `frequency_penalty` · count and `presence_penalty` are subtracted, on tokens of the output alone
    4. masked are: all but `allowed_token_ids`; the last token of a bad word; end tokens before `min_tokens`; what
       `structured` does not allow
    5. `temperature` divides; 0 takes the largest logit (the lower index of equals) and ignores the steps below
    6. `min_p` keeps the tokens of at least min_p times the largest probability
    7. `top_k` keeps the k largest logits, and those equal to the k-th; 0 or -1 keeps all
    8. `top_p` keeps the most probable of the rest until their probabilities, renormalised, sum to top_p

    `seed` None draws a fresh one. A given seed repeats the tokens, whatever else runs: a token's random number depends
    only on the seed, on which of the `n` sequences it belongs to, and on the number of tokens before it.

    Generation ends with an end token of the model (unless `ignore_eos`) or one of `stop_token_ids`, whose text is not
    emitted, or where the text first completes one of `stop`, which is cut off (unless `include_stop_str_in_output`).
    The text of the first `min_tokens` tokens is not searched for `stop`. `bad_words` are banned as the tokens that the
    tokenizer makes of them; other tokens can still spell the same text.

    `logprobs` n asks for the log-probabilities of each chosen token and of the n most probable ones (-1: of the whole
    vocabulary), `prompt_logprobs` n for those of the prompt's tokens. Both refer to the model's own distribution,
    before the steps above.

    ValueError names the field, the value and what was expected.
    """

    n: int = 1
    max_tokens: int | None = 16  # None: until max_model_len is reached
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()  # here and in the next three, None counts as (); all resolve to tuples
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    logits_processors: Sequence[LogitsProcessor] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured: StructuredOutput | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        check, at_most = self._check, self.max_tokens
        check("n", _within(is_int, 1), "a positive integer")
        if at_most is None:
            check("min_tokens", _within(is_int, 0), "an integer of 0 or more")
        else:
            check("max_tokens", _within(is_int, 1), "a positive integer, or None")
            check("min_tokens", _within(is_int, 0, at_most), f"an integer in 0..max_tokens={at_most}")
        # larger ones are infinite in fp32, and a masked logit divided by infinity is NaN
        check("temperature", _within(is_number, 0, _FLOAT32_MAX), "a finite number of 0 (greedy) or more")
        check("top_p", lambda v: is_number(v) and 0 < v <= 1, "a number in (0, 1]")
        check("top_k", _within(is_int, -1), "an integer of 0 (off), -1 (off) or more")
        check("min_p", _within(is_number, 0, 1), "a number in [0, 1]")
        check("repetition_penalty", lambda v: is_number(v) and 0 < v <= _FLOAT32_MAX, "a finite number greater than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, _within(is_number, -2, 2), "a number in [-2, 2]")
        if self.seed is not None:
            check("seed", _within(is_int, 0, 2**63 - 1), "an integer in 0..2**63 - 1, or None")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check(name, _within(is_int, -1), "an integer of -1 (all) or more, or None")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "bad_words"):
            self._sequence(name, lambda v: isinstance(v, str) and v != "", "text of at least one character")
        self._sequence("stop_token_ids", _is_token, "a token id")
        self._sequence("logits_processors", callable, "a callable")
        if self.allowed_token_ids is not None:
            self._sequence("allowed_token_ids", _is_token, "a token id")
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids=() allows nothing: expected at least one token id, or None")
        if self.logit_bias is not None:
            check("logit_bias", lambda v: isinstance(v, Mapping), "a mapping of token ids to numbers")
            for token, bias in self.logit_bias.items():
                if not (_is_token(token) and is_number(bias) and abs(bias) <= _FLOAT32_MAX):
                    raise ValueError(f"logit_bias has {token!r}: {bias!r}, expected a token id and a finite number")
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for name in ("include_stop_str_in_output", "ignore_eos"):
            check(name, lambda v: isinstance(v, bool), "True or False")
        check("structured", lambda v: isinstance(v, (StructuredOutput, type(None))), "a StructuredOutput")
        check("output_kind", lambda v: isinstance(v, RequestOutputKind), "a RequestOutputKind")
        if self.structured is not None and self.ignore_eos:
            raise ValueError("ignore_eos=True with structured: expected False, only an end token ends a complete text")

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken without a random number; top_k=1 takes the lower index of equals, too."""
        return self.temperature == 0 or self.top_k == 1

    def end_token_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The tokens that end this request on a model with these end tokens."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else eos_token_ids)

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if a token id is not in the vocabulary, or logprobs asks for more tokens than it has."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise ValueError(f"{name} has token id {token}: expected 0..{vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} is not in -1..{vocab_size}, the size of the vocabulary")

    def _check(self, name: str, fits: Callable[[Any], bool], expected: str) -> None:
        if not fits(value := getattr(self, name)):
            raise ValueError(f"{name}={value!r} is not {expected}")

    def _sequence(self, name: str, fits: Callable[[Any], bool], expected: str) -> None:
        value = () if getattr(self, name) is None else getattr(self, name)
        if not isinstance(value, (list, tuple, set, frozenset, range)):
            raise ValueError(f"{name}={value!r} is not a list of which each is {expected}")
        for item in value:
            if not fits(item):
                raise ValueError(f"{name} has {item!r}, which is not {expected}")
        object.__setattr__(self, name, tuple(value))  # resolved once, here


def _within(kind: Callable[[Any], bool], least: float, most: float = math.inf) -> Callable[[Any], bool]:
    """Whether a value is of this kind and in least … most; a NaN is not."""
    return lambda value: kind(value) and least <= value <= most


_is_token = _within(is_int, 0)
_COUNTER = struct.Struct("<QQQ")


def uniform(seed: int, sequence: int, position: int) -> float:
    """A random number of [0, 1) for the token at `position` of a request's `sequence`-th sequence, exact in fp32.

    A hash of the three (half a microsecond): the numbers can be computed in any order and are the same on every
    machine. It has 24 bits, because fp32 would round more of them up to 1.
    """
    digest = blake2b(_COUNTER.pack(seed, sequence, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 40) * 2.0**-24
