"""From a prompt and parameters to a request that is ready to run, with everything checked that can be."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import cached_property
from itertools import count
from numbers import Integral

from grok_engine.config import EngineConfig
from grok_engine.sampling.params import SamplingParams
from grok_engine.sampling.state import SamplingState, bad_word_tokens
from grok_engine.sampling.structured import StructuredCompiler
from grok_engine.tokenizer.base import Tokenizer

from .request import Answer, Request
from .sequence import SequenceState
from .text import SequenceText, begins_text

Prompt = str | Sequence[int]


class RequestBuilder:
    """Makes the requests of one engine."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer | None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._serial, self._seq_ids = count(), count()

    @cached_property
    def _compiler(self) -> StructuredCompiler:
        assert self.tokenizer is not None
        return StructuredCompiler(self.tokenizer, self.config.model.vocab_size, self.config.model.eos_token_ids)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. ValueError without a tokenizer for text, or if an id or the length is out of range."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"prompt {prompt[:40]!r} is text, but the model has no tokenizer: give token ids")
            token_ids = self.tokenizer.encode(prompt)
        else:
            values = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # of an array or a tensor
            if not isinstance(values, Sequence):
                raise ValueError(f"prompt {prompt!r} is neither text nor a list of token ids")
            token_ids = list(values)
        if not token_ids:
            raise ValueError(f"prompt {prompt!r} is empty: expected at least one token")
        vocab, longest = self.config.model.vocab_size, self.config.max_len
        for t in token_ids:
            if not isinstance(t, Integral) or isinstance(t, bool) or not 0 <= t < vocab:
                raise ValueError(f"token id {t!r} is not in the vocabulary: expected an integer in 0..{vocab - 1}")
        if len(token_ids) > longest:
            raise ValueError(f"prompt has {len(token_ids)} tokens, expected at most max_model_len={longest}")
        return [int(t) for t in token_ids]

    def build(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int) -> Request:
        """A request with all of its n answers, not started yet. ValueError names what this engine cannot serve."""
        config, tokenizer, eos = self.config, self.tokenizer, self.config.model.eos_token_ids
        prompt_ids = self.encode(prompt)
        room = config.max_len - len(prompt_ids)
        if room < 1:
            raise ValueError(f"prompt has {len(prompt_ids)} tokens, all of max_model_len: no room for a new one")
        params.check_vocabulary(config.model.vocab_size)
        serial = next(self._serial)
        seed = params.seed
        if seed is None:
            seed = secrets.randbits(63) if config.seed is None else config.seed + serial
        for name in ("stop", "bad_words", "structured") if tokenizer is None else ():
            if value := getattr(params, name):
                raise ValueError(f"{name}={value!r} needs text, but the model has no tokenizer: expected none")
        bad_words = bad_word_tokens(params.bad_words, tokenizer.encode) if tokenizer else []
        at_start = tokenizer is not None and begins_text(tokenizer, prompt_ids)
        scored = params.prompt_logprobs is not None
        answers = []
        for index in range(params.n):
            state = SequenceState(
                next(self._seq_ids), prompt_ids, min(params.max_tokens, room), priority,
                use_cache=not scored or index > 0,  # a cached prefix has no logits to score
                logits_from=0 if scored else -1,
            )  # fmt: skip
            matcher = self._compiler.matcher(params.structured, at_start=at_start) if params.structured else None
            sampler = SamplingState(
                params, state.output_ids, seed=seed % 2**63, index=index, prompt=prompt_ids, eos_token_ids=eos,
                bad_words=bad_words, matcher=matcher,
            )  # fmt: skip
            text = SequenceText(
                params, tokenizer, state.output_ids, eos_token_ids=eos, context=prompt_ids, max_tokens=room
            )
            answers.append(Answer(index, state, sampler, text))
        return Request(
            request_id, prompt if isinstance(prompt, str) else None, prompt_ids, params, time.monotonic(), answers,
            forked=params.n == 1, prompt_logprobs=[None] * len(prompt_ids) if scored else None,
        )  # fmt: skip
