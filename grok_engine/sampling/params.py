"""How a request samples its tokens: the parameters, and its random numbers."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import Any, Literal

from torch import Tensor

from grok_engine.config import as_bool, as_float, as_int, shown

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
_FLOAT32_MAX = 3.4028234663852886e38
_INT64_MAX = 2**63 - 1


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

    whitespace, of a JSON schema: "compact" has at most one space after a comma or colon and none elsewhere, so that
    whitespace cannot go on for ever; "flexible" has any, as the model likes. Numbers in a schema are refused beyond
    2**53 and beyond 15 digits, which the grammar library would round.
    """

    regex: str | None = None
    json_schema: str | Mapping[str, Any] | bool | None = None
    grammar: str | None = None
    whitespace: Literal["compact", "flexible"] = "compact"

    def __post_init__(self) -> None:
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"structured.{name}={value!r} is not text")
        if not isinstance(self.json_schema, (str, Mapping, bool, type(None))):
            raise ValueError(f"structured.json_schema={self.json_schema!r} is not an object, true, false or JSON text")
        if self.whitespace not in ("compact", "flexible"):
            raise ValueError(f"structured.whitespace={self.whitespace!r} is not 'compact' or 'flexible'")
        given = [name for name in ("regex", "json_schema", "grammar") if getattr(self, name) is not None]
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
    The text of the first `min_tokens` tokens is not searched for `stop`. `max_tokens` None generates until
    max_model_len is reached, or the KV cache is full.

    Control tokens are left out of the text, unless `skip_special_tokens` is False: then each is there as it is spelled,
    `stop` finds it, and a model that marks its tool calls by control tokens shows them.

    `bad_words` bans token sequences, not text: those that the tokenizer makes of each word at the start of a text,
    after a space and after punctuation. The model can still spell the word with other tokens (shorter ones, or one that
    holds a part of the word's neighbour), and a model that is drawn to a word often does. Upper and lower case are two
    words. Where a text must not appear, search the output for it.

    `expert_load` asks how many of the request's tokens, of prompt and answers, each expert of each layer gets:
    `RequestOutput.expert_load`. It needs an engine with `expert_load=True`. The whole prompt is computed for it, cached
    or not.

    `logprobs` n asks for the log-probabilities of each chosen token and of the n most probable ones (-1: of the whole
    vocabulary), `prompt_logprobs` n for those of the prompt's tokens. Both refer to the model's own distribution,
    before the steps above.

    Numbers and lists may be numpy's or tensors; they become Python's. ValueError names the field, the value and what
    was expected. The engine's own limits (`EngineConfig`) and the vocabulary are checked when a request is added.
    """

    n: int = 1
    max_tokens: int | None = 16  # None: as long as there is room
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
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured: StructuredOutput | None = None
    expert_load: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        """Check every field, and turn numpy's numbers and arrays into Python's, so that none is seen further on."""
        read = self._read
        read("n", as_int, 1, _INT64_MAX, "an integer in 1..2**63 - 1")
        read("max_tokens", as_int, 1, _INT64_MAX, "an integer in 1..2**63 - 1, or None", optional=True)
        most = _INT64_MAX if self.max_tokens is None else self.max_tokens
        read("min_tokens", as_int, 0, most, f"an integer in 0..max_tokens={self.max_tokens}")
        # larger ones are infinite in fp32, and a masked logit divided by infinity is NaN
        read("temperature", as_float, 0, _FLOAT32_MAX, "a finite number of 0 (greedy) or more")
        read("top_p", as_float, math.ulp(0), 1, "a number in (0, 1]")
        read("top_k", as_int, -1, _INT64_MAX, "an integer of 0 (off), -1 (off) or more, of 64 bits")
        read("min_p", as_float, 0, 1, "a number in [0, 1]")
        # beyond these, a penalised logit may be infinite in fp32
        read("repetition_penalty", as_float, 1e-6, 1e6, "a number in [1e-6, 1e6]")
        for name in ("presence_penalty", "frequency_penalty"):
            read(name, as_float, -2, 2, "a number in [-2, 2]")
        read("seed", as_int, 0, _INT64_MAX, "an integer in 0..2**63 - 1, or None", optional=True)
        for name in ("logprobs", "prompt_logprobs"):
            read(name, as_int, -1, _INT64_MAX, "an integer of -1 (all) or more, of 64 bits, or None", optional=True)
        for name in ("include_stop_str_in_output", "skip_special_tokens", "ignore_eos", "expert_load"):
            read(name, as_bool, False, True, "True or False")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "bad_words"):
            self._sequence(name, _text, "text of at least one character, without half a surrogate pair")
        self._sequence("stop_token_ids", _token, "a token id")
        self._sequence("logits_processors", lambda v: v if callable(v) else None, "a callable")
        if self.allowed_token_ids is not None:
            self._sequence("allowed_token_ids", _token, "a token id")
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids=() allows nothing: expected at least one token id, or None")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if not isinstance(self.structured, (StructuredOutput, type(None))):
            raise ValueError(f"structured={shown(self.structured)} is not a StructuredOutput")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind={shown(self.output_kind)} is not a RequestOutputKind")
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

    def _read(
        self,
        name: str,
        read: Callable[[Any], float | None],
        least: float,
        most: float,
        expected: str,
        *,
        optional: bool = False,
    ) -> None:
        """Replace a field by what `read` makes of it. ValueError if that is None, NaN, or not in least … most."""
        value = getattr(self, name)
        if value is None and optional:
            return
        found = read(value)
        if found is None or not least <= found <= most:
            raise ValueError(f"{name}={shown(value)} is not {expected}")
        object.__setattr__(self, name, found)

    def _sequence(self, name: str, read: Callable[[Any], Any], expected: str) -> None:
        """Replace a field by the tuple of what `read` makes of each of its items."""
        given = getattr(self, name)
        value: Any = () if given is None else given
        if hasattr(value, "tolist") and not isinstance(value, memoryview):  # an array or a tensor
            value = value.tolist()
        if not isinstance(value, (list, tuple, set, frozenset, range)):
            raise ValueError(f"{name}={shown(given)} is not a list of which each is {expected}")
        found = tuple(map(read, value))
        for item, becomes in zip(value, found, strict=True):
            if becomes is None:
                empty = ", which is empty" if isinstance(item, str) and not item else ""
                raise ValueError(f"{name} has {shown(item)}{empty}: expected {expected}")
        object.__setattr__(self, name, found)


def _token(value: Any) -> int | None:
    token = as_int(value)
    return token if token is not None and 0 <= token <= _INT64_MAX else None


def _text(value: Any) -> str | None:
    if not isinstance(value, str) or not value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return str.__str__(value)  # not its own __str__: that of a (str, Enum) is another text


def _bias(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise ValueError(f"logit_bias={shown(given)} is not a mapping of token ids to numbers")
    found = {}
    for key, value in given.items():
        token, bias = _token(key), as_float(value)
        if token is None or bias is None or not abs(bias) <= _FLOAT32_MAX:
            raise ValueError(f"logit_bias has {shown(key)}: {shown(value)}, expected a token id and a finite number")
        found[token] = bias
    return found


_COUNTER = struct.Struct("<QQQ")


def uniform(seed: int, sequence: int, position: int) -> float:
    """A random number of [0, 1) for the token at `position` of a request's `sequence`-th sequence, exact in fp32.

    A hash of the three (half a microsecond): the numbers can be computed in any order and are the same on every
    machine. It has 24 bits, because fp32 would round more of them up to 1.
    """
    digest = blake2b(_COUNTER.pack(seed, sequence, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 40) * 2.0**-24
