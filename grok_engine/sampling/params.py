"""How a request samples its tokens: the parameters, and the two small things that sampling and stopping share."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from hashlib import blake2b
from typing import Any

from torch import Tensor

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
_FLOAT32_MAX = 3.4028234663852886e38


class RequestOutputKind(Enum):
    """What an output holds: all of the text so far, what is new in it, or nothing before the request is finished."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form that the text must have: exactly one of a regex, a JSON schema (text or object) and a grammar.

    A regex matches the whole text and has no look-around; its `\\d` is a digit of any script, as in Python. A grammar is
    GBNF (`root ::= …`) or Lark (`start: …`).
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
    """How many tokens, which, and where to stop. The names and the meanings are vLLM's.

    A token is chosen from the logits in this order:

    1. `logits_processors`, in turn: `processor(tokens generated so far, logits_V) -> logits_V`, fp32
    2. `logit_bias` is added
    3. `repetition_penalty` r, on tokens of the prompt and the output: positive logits / r, the others · r;
       then `frequency_penalty` · count and `presence_penalty` are subtracted, on tokens of the output alone
    4. what must not come is masked: all but `allowed_token_ids`; the last token of a bad word; end tokens before
       `min_tokens`; what `structured` does not allow
    5. `temperature` divides; 0 takes the largest logit (the lower index of equals), and ignores what follows
    6. `min_p` keeps the tokens of at least min_p times the largest probability
    7. `top_k` keeps the k largest logits, and those equal to the k-th; 0 or -1 keeps all
    8. `top_p` keeps the most probable of the rest until their probabilities, renormalised, sum to top_p

    `seed` None draws a fresh one. A given seed repeats the tokens, whatever else runs: the random number of a token
    depends on the seed, on which of the `n` sequences it is and on how many tokens came before, on nothing else.

    Generation ends with an end token of the model (unless `ignore_eos`) or one of `stop_token_ids`, whose text is not
    emitted, or where the text first completes one of `stop`, which is cut off (unless `include_stop_str_in_output`).
    The text of the first `min_tokens` tokens is not searched for `stop`. `bad_words` are banned as the tokens that
    the tokenizer makes of them; other spellings of the same text in tokens can still come.

    `logprobs` n asks for the log-probability of each chosen token and of the n most probable ones, -1 for all of the
    vocabulary; `prompt_logprobs` the same of the prompt. Both are of the model's own distribution, before any of the
    steps above.

    ValueError names the field, the value and what was expected.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()  # None, too, is taken as (), here and in the next three; resolved to tuples
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
        whole, number = self._whole, self._number
        whole("n", lambda v: v >= 1, "a positive integer")
        whole("max_tokens", lambda v: v >= 1, "a positive integer")
        whole("min_tokens", lambda v: 0 <= v <= self.max_tokens, f"an integer in 0..max_tokens={self.max_tokens}")
        # beyond fp32 it would become infinite there, and a masked logit over infinity is no number
        number("temperature", lambda v: 0 <= v <= _FLOAT32_MAX, "a finite number of 0 (greedy) or more")
        number("top_p", lambda v: 0 < v <= 1, "a number in (0, 1]")
        whole("top_k", lambda v: v >= -1, "an integer of 0 (off), -1 (off) or more")
        number("min_p", lambda v: 0 <= v <= 1, "a number in [0, 1]")
        number("repetition_penalty", lambda v: 0 < v <= _FLOAT32_MAX, "a finite number greater than 0")
        number("presence_penalty", lambda v: -2 <= v <= 2, "a number in [-2, 2]")
        number("frequency_penalty", lambda v: -2 <= v <= 2, "a number in [-2, 2]")
        whole("seed", lambda v: 0 <= v < 2**63, "an integer in 0..2**63 - 1, or None", optional=True)
        for name in ("logprobs", "prompt_logprobs"):
            whole(name, lambda v: v >= -1, "an integer of -1 (all) or more, or None", optional=True)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._sequence("stop", lambda v: isinstance(v, str) and v != "", "text of at least one character")
        self._sequence("bad_words", lambda v: isinstance(v, str) and v != "", "text of at least one character")
        self._sequence("stop_token_ids", _is_token, "a token id")
        self._sequence("logits_processors", callable, "a callable")
        if self.allowed_token_ids is not None:
            self._sequence("allowed_token_ids", _is_token, "a token id")
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids=() allows nothing: expected at least one token id, or None")
        self._check_bias()
        for name in ("include_stop_str_in_output", "ignore_eos"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        self._check("structured", isinstance(self.structured, (StructuredOutput, type(None))), "a StructuredOutput")
        self._check("output_kind", isinstance(self.output_kind, RequestOutputKind), "a RequestOutputKind")
        if self.structured is not None and self.ignore_eos:
            raise ValueError("ignore_eos=True with structured: expected False, only an end token ends a complete text")

    @property
    def greedy(self) -> bool:
        """No random number is used: of the one token that top_k=1 leaves, too, the lower index of equals is meant."""
        return self.temperature == 0 or self.top_k == 1

    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, as the tuple that it was resolved to."""
        assert isinstance(self.stop, tuple)
        return self.stop

    def end_token_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The tokens that end this request on a model with these end tokens."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else eos_token_ids)

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if a token id is not in the vocabulary, or more log-probabilities are asked for than it has."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise ValueError(f"{name} has token id {token}: expected 0..{vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} is not in -1..{vocab_size}, the size of the vocabulary")

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name}={getattr(self, name)!r} is not {expected}")

    def _whole(self, name: str, fits: Callable[[int], bool], expected: str, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if not (optional and value is None):
            self._check(name, isinstance(value, int) and not isinstance(value, bool) and fits(value), expected)

    def _number(self, name: str, fits: Callable[[float], bool], expected: str) -> None:
        value = getattr(self, name)
        self._check(name, _is_number(value) and fits(value), expected)  # a NaN fits no comparison

    def _sequence(self, name: str, fits: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if value is None:
            value = ()
        if not isinstance(value, (list, tuple, set, frozenset, range)):
            raise ValueError(f"{name}={value!r} is not a list of which each is {expected}")
        for item in value:
            if not fits(item):
                raise ValueError(f"{name} has {item!r}, which is not {expected}")
        object.__setattr__(self, name, tuple(value))  # resolved once, here

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        self._check("logit_bias", isinstance(self.logit_bias, Mapping), "a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not (_is_token(token) and _is_number(bias) and abs(bias) <= _FLOAT32_MAX):
                raise ValueError(f"logit_bias has {token!r}: {bias!r}, expected a token id and a finite number")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_COUNTER = struct.Struct("<QQQ")


def uniform(seed: int, sequence: int, position: int) -> float:
    """A random number of [0, 1) for the token at `position` of a request's `sequence`-th sequence, exact in fp32.

    By a hash of the three: any of them can be asked for again, in any order, at half a microsecond, and the numbers
    are the same on every machine. 24 bits, because fp32 would round more of them up to 1.
    """
    digest = blake2b(_COUNTER.pack(seed, sequence, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 40) * 2.0**-24


class Patterns:
    """Aho and Corasick's automaton ("Efficient string matching", 1975): many patterns in one pass, one step a symbol.

    A state is the longest suffix of what was read that begins a pattern, `depth` its length; `found` are the patterns
    that end there, as indices, the longest first. State 0 is the empty suffix, and where reading begins.
    """

    def __init__(self, patterns: Sequence[Sequence[Hashable]]) -> None:
        self.children: list[dict[Hashable, int]] = [{}]
        self.depth = [0]
        self.found: list[list[int]] = [[]]
        self._fallback = [0]
        for index, pattern in enumerate(patterns):
            state = 0
            for symbol in pattern:
                if symbol not in self.children[state]:
                    self.children[state][symbol] = len(self.children)
                    self.children.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.found.append([])
                    self._fallback.append(0)
                state = self.children[state][symbol]
            self.found[state].append(index)
        queue = list(self.children[0].values())
        if self.found[0]:  # an empty pattern ends everywhere
            for state in queue:
                self.found[state] += self.found[0]
        for state in queue:  # grows while it is read: by depth, so that a fallback is complete before it is used
            for symbol, child in self.children[state].items():
                self._fallback[child] = self.step(self._fallback[state], symbol)
                self.found[child] += self.found[self._fallback[child]]
                queue.append(child)

    def step(self, state: int, symbol: Hashable) -> int:
        """The state after one more symbol."""
        while state and symbol not in self.children[state]:
            state = self._fallback[state]
        return self.children[state].get(symbol, 0)


def fresh_seed(params: SamplingParams) -> int:
    """The seed of a request: the given one, or a new one."""
    return secrets.randbits(63) if params.seed is None else params.seed
