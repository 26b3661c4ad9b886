"""llama.cpp through the bindings of the llama-cpp-python package, where its own tools are not on PATH.

    python -m benchmarks.cpu_model.llama_python bench MODEL THREADS REQUESTS PROMPT NEW
    python -m benchmarks.cpu_model.llama_python quantize BF16 TARGET KIND

`bench` prints a line of JSON as llama-batched-bench does, of the same work: all prompts in batches of 2048 tokens, then
NEW steps of one token for each request.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

BATCH, UBATCH, WARM = 2048, 512, 16  # tokens, as the tool's own defaults


class Model:
    """A model with room for the requests, on so many threads."""

    def __init__(self, path: str, threads: int, requests: int, length: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.api.llama_log_set(_SILENT, ctypes.c_void_p())
        self.api.llama_backend_init()
        self.model = self.api.llama_model_load_from_file(path.encode(), self.api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot read {path}")
        params = self.api.llama_context_default_params()
        params.n_ctx = max(512, requests * length)
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, UBATCH, requests
        params.n_threads = params.n_threads_batch = threads
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens for {path}")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.batch = self.api.llama_batch_init(BATCH, 0, 1)

    def run(self, tokens: Sequence[tuple[int, int]]) -> None:
        """Compute tokens, each of a request and at a position, with logits for the last of each request."""
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

    def forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)


def bench(path: str, threads: int, requests: int, prompt: int, new: int) -> dict[str, float]:
    """Tokens a second of all requests together."""
    model = Model(path, threads, requests, prompt + new)
    model.run([(0, i) for i in range(WARM)])
    model.forget()
    start = time.perf_counter()
    model.run([(request, i) for request in range(requests) for i in range(prompt)])
    first = time.perf_counter()
    for step in range(new):
        model.run([(request, prompt + step) for request in range(requests)])
    end = time.perf_counter()
    return {"speed_pp": requests * prompt / (first - start), "speed_tg": requests * new / (end - first)}


def quantize(source: str, target: str, kind: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if status := llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize gave {status} for {source}")


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "bench":
        path, *numbers = arguments[1:]
        print(json.dumps(bench(path, *map(int, numbers))), flush=True)
    else:
        quantize(*arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
