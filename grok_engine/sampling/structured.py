"""Structured outputs: which tokens keep a text matching a regex, a JSON schema or a grammar, by llguidance.

The library takes a token for fixed bytes. Some tokenizers drop a leading space at the start of a text, so there a token
can have other bytes than inside. The first token therefore has a table of its own, and after it the library's state is
advanced byte by byte.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from functools import cache, cached_property, lru_cache
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
    """One sequence's state in its grammar. Both methods raise ValueError if the library gives up."""

    def __init__(self, vocabulary: _Vocabulary, matcher: LLMatcher, first: LLMatcher | None) -> None:
        self._vocabulary, self._matcher, self._first = vocabulary, matcher, first

    def allowed(self) -> npt.NDArray[np.uint8]:
        """One bit a token, lowest first: whether the text can be completed after it (end tokens: it is complete)."""
        matcher = self._first or self._matcher
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        _check(matcher)  # a failed matcher's mask allows the end tokens
        return mask

    def accept(self, token_id: int) -> None:
        """ValueError if the token is not allowed."""
        if token_id in self._vocabulary.eos:  # the library refuses it once nothing else can follow
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
    """Makes matchers for one model. The tables of its tokens (half a second for 131072) are built at the first use.

    ImportError names the extra to install if the library is missing.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        if not eos_token_ids:
            raise ValueError(f"eos_token_ids={eos_token_ids!r}: structured output ends by an end token, expected one")
        self._library = _llguidance()
        self._vocabulary = _Vocabulary(self._library, tokenizer, vocab_size, tuple(eos_token_ids))
        self._template = lru_cache(_CACHED)(self._compile)

    def matcher(self, structured: StructuredOutput, *, at_start: bool = True) -> StructuredMatcher:
        """A matcher at the start of its grammar. ValueError with the reason if the regex, schema or grammar is invalid.

        at_start: the output begins a text, so that the tokenizer may drop its leading space.
        """
        grammar, named, first = self._grammar(structured), _named(structured), None
        if at_start and self._vocabulary.start_differs:
            first = self._template(grammar, named, at_start=True).deep_copy()
        matcher = self._template(grammar, named, at_start=False).deep_copy()
        return StructuredMatcher(self._vocabulary, matcher, first)

    def _compile(self, grammar: str, named: str, *, at_start: bool) -> LLMatcher:
        tokenizer = self._vocabulary.table(at_start)
        failed, messages = self._library.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        if failed:
            raise ValueError(f"{named}: {'; '.join(messages)}")
        for message in messages:
            logger.warning("%s: %s", named, message)
        template: LLMatcher = self._library.LLMatcher(tokenizer, grammar, log_level=0)
        try:
            mask = template.compute_bitmask()
            _check(template)
        except ValueError as error:
            raise ValueError(f"{named}: {error}") from None
        if not np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: self._vocabulary.size].any():
            raise ValueError(f"{named}: no token of this model can begin a text that matches")
        return template

    def _grammar(self, structured: StructuredOutput) -> str:
        """The grammar in the library's own format."""
        if structured.regex is not None:
            wrapped = json.loads(self._library.LLMatcher.grammar_from_regex(structured.regex))
            lark = wrapped["grammars"][0]["lark_grammar"]  # the regex, quoted
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
    """The library's token tables: one for the inside of a text and, if it differs, one for the start.

    The 256 bytes follow the model's own tokens, so that any text can be spelled.
    """

    def __init__(self, library: ModuleType, tokenizer: Tokenizer, vocab_size: int, eos: tuple[int, ...]) -> None:
        self._library, self._tokenizer, self.eos = library, tokenizer, eos
        self.size = max(vocab_size, tokenizer.vocab_size)
        self._tokens, self.table = cache(self._spell), cache(self._build_table)  # by whether at the start of a text

    @cached_property
    def start_differs(self) -> bool:
        return self._tokens(True) != self._tokens(False)

    def spelled_at_start(self, token_id: int) -> list[int]:
        """The token, or the byte tokens of its text at the start, if that differs from its text inside."""
        data = self._tokens(True)[token_id]
        return [token_id] if data == self._tokens(False)[token_id] else [self.size + byte for byte in data]

    def _spell(self, at_start: bool) -> list[bytes]:
        found = []
        for token_id in range(self._tokenizer.vocab_size):
            surface = self._tokenizer.surface(token_id, at_start)
            data = surface.data or surface.text.encode()
            # the library marks special tokens with the byte 255, which no text has, and a token without text is never
            # allowed: it could repeat for ever
            found.append(b"" if token_id in self.eos or 0xFF in data else data)
        return found

    def _build_table(self, at_start: bool) -> LLTokenizer:
        tokens = self._tokens(at_start)
        tokens = tokens + [b""] * (self.size - len(tokens)) + [bytes([b]) for b in range(255)] + [b""]
        for token_id in self.eos:
            tokens[token_id] = b"<end %d>" % token_id
        wrapper = _Wrapper(tokens, self.eos, self.size)
        table: LLTokenizer = self._library.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=list(self.eos))
        return table


class _Wrapper:
    """A tokenizer as the library expects it."""

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
    """The grammar with `no_forcing` set: by default a forced continuation may be spelled by one token sequence only."""
    options: dict[str, Any] = {}
    before, named, after = lark.partition(_OPTIONS)
    if named:  # options may occur only once, and a translated grammar has them
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
