"""llama.cpp through the bindings of the llama-cpp-python package, in a process of its own."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

BATCH, UBATCH, WARM = 2048, 512, 16  # tokens, the defaults of llama.cpp's own tools
_silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


@dataclass(frozen=True)
class Load:
    """The load on an engine: requests at once, each with a prompt of `prompt` random tokens, then `new` tokens.

    Timed are the prompts where `new` is 0, else the mean decode step.
    """

    requests: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """Tokens in what is timed."""
        return self.requests if self.new else self.requests * self.prompt


@cache
def _api() -> Any:
    import llama_cpp

    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    return llama_cpp


class Llama:
    """One GGUF file under one load."""

    def __init__(self, path: Path, load: Load) -> None:
        self.load, self.api = load, _api()
        self.model = self.api.llama_model_load_from_file(str(path).encode(), self.api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot read {path}")
        params = self.api.llama_context_default_params()
        params.n_ctx = max(512, load.requests * (load.prompt + load.new))
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, UBATCH, load.requests
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens for {path}")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.batch = self.api.llama_batch_init(BATCH, 0, 1)

    def check(self, again: bool = False) -> None:
        """Warm up. There is no error to return: random tokens have no right answer that both engines share."""
        self._run([(0, i) for i in range(WARM)])

    def time(self, turn: int) -> float:
        """Seconds of all prompts, or of one step of one token for each request."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        requests, prompt, new = self.load.requests, self.load.prompt, self.load.new
        start = time.perf_counter()
        self._run([(request, i) for request in range(requests) for i in range(prompt)])
        first = time.perf_counter()
        for step in range(new):
            self._run([(request, prompt + step) for request in range(requests)])
        return (time.perf_counter() - first) / new if new else first - start

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def _run(self, tokens: Sequence[tuple[int, int]]) -> None:
        """Compute tokens, each (request, position), with logits for the last of each request."""
        last = {request: i for i, (request, _) in enumerate(tokens)}
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            for i, (request, position) in enumerate(part):
                self.batch.token[i] = random.randrange(self.vocabulary)
                self.batch.pos[i], self.batch.n_seq_id[i] = position, 1
                self.batch.seq_id[i][0] = request
                self.batch.logits[i] = last[request] == start + i
            self.batch.n_tokens = len(part)
            if status := self.api.llama_decode(self.context, self.batch):
                raise RuntimeError(f"llama_decode gave {status} for {len(part)} tokens")
        self.api.llama_synchronize(self.context)


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write `source` in the type of that name, such as Q8_0."""
    params = _api().llama_model_quantize_default_params()
    params.ftype = getattr(_api(), f"LLAMA_FTYPE_MOSTLY_{kind}")
    if status := _api().llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize gave {status} for {source}")
