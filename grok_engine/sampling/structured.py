"""Structured outputs: which tokens keep a text matching a regex, a JSON schema or a grammar, by llguidance.

The library takes a token for fixed bytes. Some tokenizers drop a leading space at the start of a text, so there a token
can have other bytes than inside. The first token therefore has a table of its own, and after it the library's state is
advanced byte by byte.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import CancelledError, Future
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from grok_engine.log import QuietLogger
from grok_engine.tokenizer.base import Tokenizer

from . import grammar_worker
from .grammar_check import GrammarChecker, on_large_stack
from .grammar_limits import GrammarLimits, Source, check_grammar, named
from .params import StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = QuietLogger(__name__)

_CACHED = 64  # grammars that passed, at most max_bytes each
# What the tokens of one sequence may cost its engine's thread: some time at once, and some for each token.
_BURST_SECONDS, _TOKEN_SECONDS = 0.5, 0.01


class StructuredMatcher:
    """One sequence's state in its grammar. Both methods raise ValueError if the library gives up, or if the grammar is
    so ambiguous that its tokens take more than 10 ms each (processor time; half a second may be spent at once)."""

    def __init__(self, vocabulary: _Vocabulary, matcher: LLMatcher, first: LLMatcher | None) -> None:
        self._vocabulary, self._matcher, self._first = vocabulary, matcher, first
        self._left = _BURST_SECONDS

    def copy(self) -> StructuredMatcher:
        """Another sequence at the same place. The two share the library's tables, so they fail together."""
        first = None if self._first is None else self._first.deep_copy()
        return StructuredMatcher(self._vocabulary, self._matcher.deep_copy(), first)

    def allowed(self) -> npt.NDArray[np.uint8]:
        """One bit a token, lowest first: whether the text can be completed after it (end tokens: it is complete)."""
        started = time.thread_time()
        matcher = self._first or self._matcher
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        _check(matcher)  # a failed matcher's mask allows the end tokens
        self._spend(time.thread_time() - started)
        return mask

    def accept(self, token_id: int) -> None:
        """ValueError if the token is not allowed."""
        if token_id in self._vocabulary.eos:  # the library refuses it once nothing else can follow
            if not self.complete:
                raise ValueError(f"structured output: end token {token_id} before the text is complete")
            return
        started = time.thread_time()
        tokens = [token_id]
        if self._first is not None:
            if not self._first.consume_token(token_id):
                _check(self._first)
            tokens, self._first = self._vocabulary.spelled_at_start(token_id), None
        if not self._matcher.consume_tokens(tokens):
            _check(self._matcher)
        self._left = min(self._left + _TOKEN_SECONDS, _BURST_SECONDS)
        self._spend(time.thread_time() - started)

    @property
    def complete(self) -> bool:
        """Whether the text so far matches as a whole."""
        return bool((self._first or self._matcher).is_accepting())

    def _spend(self, seconds: float) -> None:
        self._left -= seconds
        if self._left < 0:
            raise ValueError(
                f"structured output: the grammar costs more than {_TOKEN_SECONDS * 1000:g} ms a token here, so other "
                "requests would wait for it: expected a less ambiguous one"
            )


class StructuredCompiler:
    """Makes matchers for one model. Safe to use from any thread; a grammar is compiled once for all that ask for it.

    The tables of the model's tokens (half a second for 131072) are built at the first use. ImportError names the extra
    to install if the library is missing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Collection[int],
        limits: GrammarLimits,
    ) -> None:
        if not eos_token_ids:
            raise ValueError(f"eos_token_ids={eos_token_ids!r}: structured output ends by an end token, expected one")
        self._library, self._limits = _llguidance(), limits
        self._vocabulary = _Vocabulary(self._library, tokenizer, vocab_size, tuple(eos_token_ids))
        self._checker = GrammarChecker(self._library, self._vocabulary.size, self._vocabulary.eos, self._limits.seconds)
        self._lock = threading.Lock()
        self._passed: OrderedDict[Source, Future[str]] = OrderedDict()

    def matcher(self, structured: StructuredOutput, *, at_start: bool = True) -> StructuredMatcher:
        """A matcher at the start of its grammar. ValueError with the reason if the regex, schema or grammar is invalid,
        exceeds a limit, or takes longer than `GrammarLimits.seconds`.

        at_start: the output begins a text, so that the tokenizer may drop its leading space.

        Every call builds the library's tables anew (1 ms for a small schema): matchers that share them, as copies do,
        share their size and their failures. Slow; other threads run meanwhile.
        """
        source, name = check_grammar(structured, self._limits), named(structured)
        try:
            grammar = self._pass(source, name)
            first = None
            if at_start and self._vocabulary.start_differs:
                first = self._build(grammar, at_start=True)
            return StructuredMatcher(self._vocabulary, self._build(grammar, at_start=False), first)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _pass(self, source: Source, name: str) -> str:
        """The grammar in the library's own format, compiled once in a child process."""
        while True:
            with self._lock:
                future = self._passed.get(source)
                mine = future is None
                if future is None:
                    future = self._passed[source] = Future()
                self._passed.move_to_end(source)
                while len(self._passed) > _CACHED:
                    self._passed.popitem(last=False)
            if not mine:
                try:
                    return future.result()
                except CancelledError:  # the thread that compiled it was interrupted
                    continue
            try:
                grammar, warnings = self._checker(*source)
            except BaseException as error:
                with self._lock:
                    if self._passed.get(source) is future:
                        del self._passed[source]
                if isinstance(error, Exception):
                    future.set_exception(error)
                else:
                    future.cancel()
                raise
            for message in warnings:
                logger.warning("%s: %s", name, message)
            future.set_result(grammar)
            return grammar

    def _build(self, grammar: str, *, at_start: bool) -> LLMatcher:
        table = self._vocabulary.table(at_start)

        def build() -> tuple[LLMatcher, bytes]:
            limits = grammar_worker.limits(self._library)
            matcher: LLMatcher = self._library.LLMatcher(table, grammar, log_level=0, limits=limits)
            return matcher, matcher.compute_bitmask()

        matcher, mask = on_large_stack(build)
        _check(matcher)
        if not np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: self._vocabulary.size].any():
            raise ValueError("no token of this model can begin a text that matches")
        return matcher


class _Vocabulary:
    """The library's token tables: one for the inside of a text and, if it differs, one for the start."""

    def __init__(self, library: ModuleType, tokenizer: Tokenizer, vocab_size: int, eos: tuple[int, ...]) -> None:
        self._library, self._tokenizer, self.eos = library, tokenizer, eos
        self.size = max(vocab_size, tokenizer.vocab_size)
        self._lock = threading.Lock()
        self._tables: dict[bool, LLTokenizer] = {}  # by whether at the start of a text

    @cached_property
    def _tokens(self) -> dict[bool, list[bytes]]:
        return {at_start: self._spell(at_start) for at_start in (False, True)}

    @cached_property
    def start_differs(self) -> bool:
        return self._tokens[True] != self._tokens[False]

    def spelled_at_start(self, token_id: int) -> list[int]:
        """The token, or the byte tokens of its text at the start, if that differs from its text inside."""
        data = self._tokens[True][token_id]
        return [token_id] if data == self._tokens[False][token_id] else [self.size + byte for byte in data]

    def table(self, at_start: bool) -> LLTokenizer:
        with self._lock:
            if at_start not in self._tables:
                tokens = self._tokens[at_start]
                tokens = tokens + [b""] * (self.size - len(tokens))
                self._tables[at_start] = grammar_worker.token_table(self._library, tokens, list(self.eos))
            return self._tables[at_start]

    def _spell(self, at_start: bool) -> list[bytes]:
        found = []
        for token_id in range(self._tokenizer.vocab_size):
            surface = self._tokenizer.surface(token_id, at_start)
            data = surface.data or surface.text.encode()
            # the library marks special tokens with the byte 255, which no text has, and a token without text is never
            # allowed: it could repeat for ever
            found.append(b"" if token_id in self.eos or 0xFF in data else data)
        return found


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            f"structured output needs the library llguidance ({error}): pip install '.[structured]' in a checkout"
        ) from None
    return llguidance


def _check(matcher: LLMatcher) -> None:
    if reason := grammar_worker.failure(matcher):
        raise ValueError(f"structured output: {reason}")
