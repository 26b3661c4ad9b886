"""From a prompt and parameters to a request that is ready to run, with everything checked that can be."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grok_engine.config import EngineConfig, as_bool, as_int, shown
from grok_engine.sampling.grammar_limits import GrammarLimits, check_grammar
from grok_engine.sampling.params import SamplingParams
from grok_engine.sampling.rules import SamplingRules, bad_word_tokens
from grok_engine.sampling.state import SamplingState
from grok_engine.sampling.structured import StructuredCompiler
from grok_engine.tokenizer.base import Tokenizer
from grok_engine.tokenizer.chat import ChatFormat, ChatOptions
from grok_engine.tokenizer.chat_files import load_chat
from grok_engine.tokenizer.chat_messages import Message

from .request import Answer, Request
from .sequence import SequenceState
from .text import SequenceText, begins_text, token_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Text, token ids, or vLLM's dicts: {"prompt": text}, {"prompt_token_ids": ids}. With both the ids are used and the text
# is what outputs show. Ids also as a numpy array or a tensor. `add_special_tokens` of a dict with text: whether BOS and
# EOS go around it as the model's files say, which is the default; nothing is added to ids.
Prompt = str | Sequence[int] | Mapping[str, Any]
_KEYS = ("prompt", "prompt_token_ids")
_ADD = "add_special_tokens"


class RequestBuilder:
    """Makes the requests of one engine. Every method may be called from any thread. capacity: in tokens, of the KV
    cache."""

    def __init__(
        self, config: EngineConfig, tokenizer: Tokenizer | None, capacity: int, folder: Path | None = None
    ) -> None:
        self.config, self.tokenizer, self.capacity, self._folder = config, tokenizer, capacity, folder
        self._serial, self._seq_ids = count(), count()
        self._lock = threading.Lock()
        self._grammar_limits = GrammarLimits(
            max_bytes=config.max_grammar_bytes, max_depth=config.max_grammar_depth,
            max_rules=config.max_grammar_rules, seconds=config.grammar_seconds,
        )  # fmt: skip
        self._compiler: StructuredCompiler | None = None
        self._spell = lru_cache(1 << 17)(partial(token_text, tokenizer)) if tokenizer else lambda token: None

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a prompt. ValueError without a tokenizer for text, or if an id or the length is out of range.

        add_special_tokens: put BOS and EOS around a text, as a request does, unless the prompt's own key decides.
        """
        return self._read(prompt, add_special_tokens)[1]

    def apply_chat_template(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """Token ids of a conversation, as `ChatFormat.encode` gives them."""
        fits = self.config.max_len * self._token_bytes if self.tokenizer else 0
        return self._chat.encode(messages, max_bytes=fits, **options)

    def chat_template(self, wanted: str | None = None, *, with_tools: bool = False) -> str:
        """The text of the template that writes conversations, as `ChatFormat.template` gives it."""
        return self._chat.template(wanted, with_tools=with_tools)

    @cached_property
    def _chat(self) -> ChatFormat:
        return load_chat(self._folder, self.tokenizer)

    def build(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int) -> Request:
        """A request with all of its n answers, not started yet. ValueError names what this engine cannot serve.

        A grammar is not compiled yet: `compile` has to follow.
        """
        config, tokenizer = self.config, self.tokenizer
        urgency = as_int(priority)
        if urgency is None or abs(urgency) >= 2**63:
            raise ValueError(f"priority={shown(priority)} is not an integer of 64 bits")
        self._check_limits(params)
        text, prompt_ids = self._read(prompt, add_special_tokens=True)
        room = config.max_len - len(prompt_ids)
        if room < 1:
            raise ValueError(f"prompt has {len(prompt_ids)} tokens, all of max_model_len: no room for a new one")
        if params.max_tokens is None:  # what the cache holds, and the last token, which is never fed back
            room = max(min(room, self.capacity + 1 - len(prompt_ids)), 1)
        rules = SamplingRules(
            params, config.model.vocab_size, eos_token_ids=config.model.eos_token_ids, prompt=prompt_ids,
            bad_words=bad_word_tokens(params.bad_words, tokenizer.encode) if tokenizer else (),
        )  # fmt: skip
        serial = next(self._serial)
        seed = params.seed
        if seed is None:
            seed = secrets.randbits(63) if config.seed is None else config.seed + serial
        scored, model = params.prompt_logprobs is not None, config.model
        answers = []
        for index in range(params.n):
            state = SequenceState(
                next(self._seq_ids), prompt_ids, room if params.max_tokens is None else min(params.max_tokens, room),
                urgency,
                # a cached prefix has no logits to score, and no choice of experts to count
                use_cache=not (scored or params.expert_load) or index > 0,
                logits_from=0 if scored else -1,
            )  # fmt: skip
            sampler = SamplingState(rules, state.output_ids, seed=seed % 2**63, index=index)
            answer_text = SequenceText(
                rules, tokenizer, state.output_ids, context=prompt_ids, max_tokens=room,
                spelled=None if params.skip_special_tokens else self._spelled,
            )  # fmt: skip
            answers.append(Answer(index, state, sampler, answer_text, self._spell))
        return Request(
            request_id, text, prompt_ids, params, time.monotonic(), answers,
            forked=params.n == 1, prompt_logprobs=[None] * len(prompt_ids) if scored else None,
            expert_load_LE=np.zeros((model.num_layers, model.num_experts), np.int64) if params.expert_load else None,
        )  # fmt: skip

    def compile(self, request: Request) -> None:
        """Give each answer a matcher of the request's grammar, if it has one. Slow. ValueError if it is invalid.

        A second call does nothing.
        """
        if request.params.structured is None or request.answers[0].sampler.matcher is not None:
            return
        assert self.tokenizer is not None
        with self._lock:
            if self._compiler is None:
                model = self.config.model
                self._compiler = StructuredCompiler(
                    self.tokenizer, model.vocab_size, model.eos_token_ids, self._grammar_limits
                )
        at_start = begins_text(self.tokenizer, request.prompt_ids)
        matcher = self._compiler.matcher(request.params.structured, at_start=at_start)
        for answer in request.answers:
            answer.sampler.matcher = matcher.copy() if answer.index else matcher

    def _check_limits(self, params: SamplingParams) -> None:
        """ValueError for parameters beyond the limits of `config`, or that need a tokenizer where there is none."""
        config = self.config
        if params.n > config.max_n:
            raise ValueError(f"n={params.n} is more than max_n={config.max_n}")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(params, name)
            wanted = config.model.vocab_size if number == -1 else number or 0
            if 0 <= config.max_logprobs < wanted:
                raise ValueError(
                    f"{name}={number} asks for {wanted} tokens, more than max_logprobs={config.max_logprobs}"
                )
        for name in ("stop", "bad_words", "structured") if self.tokenizer is None else ():
            if value := getattr(params, name):
                raise ValueError(f"{name}={shown(value)} needs text, but the model has no tokenizer: expected none")
        if (size := _size((*params.stop, *params.bad_words))) > config.max_stop_bytes:
            raise ValueError(f"stop and bad_words have {size} bytes, more than max_stop_bytes={config.max_stop_bytes}")
        if params.expert_load and not config.expert_load:
            raise ValueError("expert_load=True needs an engine that counts: LLM(…, expert_load=True)")
        if params.structured is not None:
            check_grammar(params.structured, self._grammar_limits)

    def _read(self, prompt: Prompt, add_special_tokens: bool) -> tuple[str | None, list[int]]:
        """The text of a prompt, None if it has none, and its token ids."""
        text: Any = str.__str__(prompt) if isinstance(prompt, str) else None
        ids: Any = None if isinstance(prompt, str) else prompt
        if isinstance(prompt, Mapping):
            given = {key: value for key, value in prompt.items() if value is not None}
            if (add := as_bool(given.pop(_ADD, add_special_tokens))) is None:
                raise ValueError(f"prompt has {_ADD}={shown(prompt[_ADD])}: expected True or False")
            add_special_tokens = add
            if not given or set(given) - set(_KEYS):
                raise ValueError(
                    f"prompt has the keys {shown(list(given))}: expected one or both of {', '.join(_KEYS)}, and "
                    f"perhaps {_ADD}"
                )
            text, ids = given.get("prompt"), given.get("prompt_token_ids")
            if text is not None and not isinstance(text, str):
                raise ValueError(f"prompt={shown(text)} is not text")
        ids = self._tokens(text, add_special_tokens) if ids is None and text is not None else _as_sequence(ids)
        if not ids:
            raise ValueError(f"prompt {shown(prompt)} is empty: expected at least one token")
        vocab, longest = self.config.model.vocab_size, self.config.max_len
        if len(ids) > longest:
            raise ValueError(f"prompt has {len(ids)} tokens, expected at most max_model_len={longest}")
        token_ids = []
        for value in ids:
            token = as_int(value)
            if token is None or not 0 <= token < vocab:
                several = ", and one prompt, not a list of them" if isinstance(value, (Sequence, Mapping)) else ""
                raise ValueError(
                    f"token id {shown(value)} is not in the vocabulary: expected an integer in 0..{vocab - 1}{several}"
                )
            token_ids.append(token)
        return text, token_ids

    def _tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        """The tokens of a text, and perhaps those around it. A text that cannot fit is refused before it is encoded,
        which takes a second for 10 MB."""
        if self.tokenizer is None:
            raise ValueError(f"prompt {shown(text)} is text, but the model has no tokenizer: give token ids")
        most = self.config.max_len
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt has {text[error.start]!r} at {error.start}, half of a surrogate pair: expected text"
            ) from None
        if size > most and size > most * self._token_bytes:
            raise ValueError(
                f"prompt has {size} bytes, more than max_model_len={most} tokens of at most {self._token_bytes} bytes"
            )
        ids = self.tokenizer.encode(text)
        return [*self.tokenizer.prefix, *ids, *self.tokenizer.suffix] if add_special_tokens else ids

    @cached_property
    def _spelled(self) -> dict[int, str]:
        """How control tokens are spelled, by id."""
        return {token: text for text, token in self.tokenizer.control.ids.items()} if self.tokenizer else {}

    @cached_property
    def _token_bytes(self) -> int:
        """Bytes of the longest token's text."""
        tokenizer = self.tokenizer
        assert tokenizer is not None
        surfaces = (tokenizer.surface(token, False) for token in range(tokenizer.vocab_size))
        return max(len(s.data) or len(s.text.encode()) for s in surfaces)


def _as_sequence(ids: Any) -> Sequence[Any]:
    """Token ids as they were given, or as the list that an array holds. Not copied: a range may be of any length."""
    values = ids.tolist() if hasattr(ids, "tolist") and not isinstance(ids, memoryview) else ids
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray, memoryview)):
        raise ValueError(f"prompt {shown(ids)} is neither text nor a list of token ids")
    return values


def _size(texts: Iterable[str]) -> int:
    """Bytes in UTF-8; one half of a surrogate pair counts as the three bytes that WTF-8 has for it."""
    return sum(len(text.encode(errors="surrogatepass")) for text in texts)
