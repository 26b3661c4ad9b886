"""Text that must match a regex, a JSON schema or a grammar: which tokens may come next, by the library llguidance.

The library knows a token as bytes. Ours can spell different bytes at the start of a text, where a tokenizer drops the
space that it had put before the prompt; so the first token has a table of its own, and the state after it is reached
byte by byte.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from grok_engine.tokenizer.base import Tokenizer

from .params import StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

_OPTIONS = "%llguidance"
_CACHED = 64


class StructuredMatcher:
    """Where one sequence stands in its grammar. Both methods raise ValueError where the library gives up."""

    def __init__(self, vocabulary: _Vocabulary, matcher: LLMatcher, first: LLMatcher | None) -> None:
        self._vocabulary, self._matcher, self._first = vocabulary, matcher, first

    def allowed(self) -> npt.NDArray[np.uint8]:
        """One bit a token, lowest first: those after which the text can still be completed, an end token if it is."""
        matcher = self._first or self._matcher
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        _check(matcher)  # the mask of a matcher that failed allows the end tokens
        return mask

    def accept(self, token_id: int) -> None:
        """ValueError if the token is not allowed."""
        if self._vocabulary.ends(token_id):  # which the library takes no more once nothing else can follow
            if not self.complete:
                raise ValueError(f"structured output: end token {token_id} before the text is complete")
            return
        tokens = [token_id]
        if self._first is not None:
            if not self._first.consume_token(token_id):
                _check(self._first)
            tokens, self._first = self._vocabulary.spelled_at_start(token_id), None
        if not self._matcher.consume_tokens(tokens):
            _check(self._matcher)

    @property
    def complete(self) -> bool:
        """Whether the text so far matches as a whole."""
        return bool((self._first or self._matcher).is_accepting())


class StructuredCompiler:
    """Matchers for one model: its tokenizer, the size of its logits, and the tokens that end a text.

    Made once for a model; the tables of its tokens (half a second for 131072) are built at the first use. ImportError
    names the extra to install where the library is missing.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        if not eos_token_ids:
            raise ValueError(f"eos_token_ids={eos_token_ids!r}: structured output ends by an end token, expected one")
        self._library = _llguidance()
        self._vocabulary = _Vocabulary(self._library, tokenizer, vocab_size, tuple(eos_token_ids))
        self._compiled: OrderedDict[tuple[str, bool], LLMatcher] = OrderedDict()

    def matcher(self, structured: StructuredOutput, *, at_start: bool = True) -> StructuredMatcher:
        """A matcher at the beginning. ValueError with the reason if the regex, schema or grammar is not valid.

        at_start: whether the output is decoded on its own, so that a tokenizer may drop its leading space.
        """
        grammar = self._grammar(structured)
        first = None
        if at_start and self._vocabulary.start_differs:
            first = self._template(grammar, True, structured).deep_copy()
        return StructuredMatcher(self._vocabulary, self._template(grammar, False, structured).deep_copy(), first)

    def _template(self, grammar: str, at_start: bool, structured: StructuredOutput) -> LLMatcher:
        key = grammar, at_start
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        tokenizer = self._vocabulary.at_start if at_start else self._vocabulary.inside
        failed, messages = self._library.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        if failed:
            raise ValueError(f"{_named(structured)}: {'; '.join(messages)}")
        for message in messages:
            logger.warning("%s: %s", _named(structured), message)
        template: LLMatcher = self._library.LLMatcher(tokenizer, grammar, log_level=0)
        try:
            mask = template.compute_bitmask()
            _check(template)
        except ValueError as error:
            raise ValueError(f"{_named(structured)}: {error}") from None
        if not np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: self._vocabulary.size].any():
            raise ValueError(f"{_named(structured)}: no token of this model can begin a text that matches")
        self._compiled[key] = template
        if len(self._compiled) > _CACHED:
            self._compiled.popitem(last=False)
        return template

    def _grammar(self, structured: StructuredOutput) -> str:
        """The library's own form of all three kinds."""
        if structured.regex is not None:
            wrapped = json.loads(self._library.LLMatcher.grammar_from_regex(structured.regex))
            lark = wrapped["grammars"][0]["lark_grammar"]  # with the regex quoted as it must be
        elif structured.json_schema is not None:
            schema = structured.json_schema
            try:
                value = json.loads(schema) if isinstance(schema, str) else schema
                lark = f"start: %json {json.dumps(dict(value) if isinstance(value, Mapping) else value)}"
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{_named(structured)} is not JSON: {error}") from None
            if not isinstance(value, (Mapping, bool)):
                raise ValueError(f"{_named(structured)} is not a schema: expected an object, true or false")
        else:
            assert structured.grammar is not None
            try:
                lark = self._library.grammar_from("grammar", structured.grammar)
            except ValueError as error:
                raise ValueError(f"{_named(structured)}: {error}") from None
        try:
            grammar: str = self._library.LLMatcher.grammar_from_lark(_unforced(lark))
        except ValueError as error:
            raise ValueError(f"{_named(structured)}: {_OPTIONS}: {error}") from None
        return grammar


class _Vocabulary:
    """The library's tables of tokens: inside a text, and, where it is not the same, at the start of one.

    The 256 bytes stand behind the model's own tokens, so that any text can be handed over.
    """

    def __init__(self, library: ModuleType, tokenizer: Tokenizer, vocab_size: int, eos: tuple[int, ...]) -> None:
        self._library, self._tokenizer, self._eos = library, tokenizer, eos
        self.size = max(vocab_size, tokenizer.vocab_size)

    @cached_property
    def _tokens_inside(self) -> list[bytes]:
        return self._spelled(False)

    @cached_property
    def _tokens_at_start(self) -> list[bytes]:
        return self._spelled(True)

    @cached_property
    def inside(self) -> LLTokenizer:
        return self._table(self._tokens_inside)

    @cached_property
    def at_start(self) -> LLTokenizer:
        return self._table(self._tokens_at_start)

    @cached_property
    def start_differs(self) -> bool:
        return self._tokens_at_start != self._tokens_inside

    def ends(self, token_id: int) -> bool:
        return token_id in self._eos

    def spelled_at_start(self, token_id: int) -> list[int]:
        """The token, or, if it spells something else at the start than inside a text, the tokens of those bytes."""
        data = self._tokens_at_start[token_id]
        return [token_id] if data == self._tokens_inside[token_id] else [self.size + byte for byte in data]

    def _bytes(self, token_id: int, at_start: bool) -> bytes:
        surface = self._tokenizer.surface(token_id, at_start)
        data = surface.data or surface.text.encode()
        return b"" if 0xFF in data else data  # no text has that byte, with which the library marks special tokens

    def _spelled(self, at_start: bool) -> list[bytes]:
        # A token without text is never allowed: it would add nothing, for ever.
        return [b"" if i in self._eos else self._bytes(i, at_start) for i in range(self._tokenizer.vocab_size)]

    def _table(self, tokens: list[bytes]) -> LLTokenizer:
        tokens = tokens + [b""] * (self.size - len(tokens)) + [bytes([b]) for b in range(255)] + [b""]
        for token_id in self._eos:
            tokens[token_id] = b"<end %d>" % token_id
        wrapper = _Wrapper(tokens, self._eos, self.size)
        return self._library.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=list(self._eos))  # type: ignore[no-any-return]


class _Wrapper:
    """The attributes under which the library looks for a tokenizer in Python."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos: tuple[int, ...], first_byte: int) -> None:
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, eos[0], list(eos)
        self._first_byte = first_byte

    def __call__(self, text: Any) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        return [self._first_byte + byte for byte in data]


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            f"structured output needs the library llguidance ({error}): pip install 'grok-engine[structured]'"
        ) from None
    return llguidance


def _unforced(lark: str) -> str:
    """The grammar with an option set: else, where the text has one continuation, only one spelling of it is allowed."""
    options: dict[str, Any] = {}
    before, named, after = lark.partition(_OPTIONS)
    if named:  # which a grammar may have but once, and a translated one does
        start = len(after) - len(after.lstrip())
        options, end = json.JSONDecoder().raw_decode(after, start)
        lark = before + after[end:]
    return f"{_OPTIONS} {json.dumps({**options, 'no_forcing': True})}\n{lark}"


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        reason = matcher.get_error().split("\n<state>")[0].splitlines()  # the rest is the library's own state
        what = reason[0] if reason else "unknown error"
        raise ValueError(f"structured output: {'no token can follow' if what.startswith('NoExtension') else what}")


def _named(structured: StructuredOutput) -> str:
    name = next(n for n in ("regex", "json_schema", "grammar") if getattr(structured, n) is not None)
    value = repr(getattr(structured, name))
    return f"structured.{name}={value if len(value) <= 200 else value[:200] + '…'}"
