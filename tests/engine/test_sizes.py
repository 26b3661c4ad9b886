"""KV memory, and requests and options that are refused because they do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from grok_engine import ConfigError
from tests.engine.test_runtime import PROMPT, answer, greedy, make

# layers · keys and values · heads · head size
TOKEN = 2 * 2 * 8 * 16


@pytest.mark.parametrize(
    ("kv_dtype", "token_bytes"),
    [("float32", TOKEN * 4), ("bfloat16", TOKEN * 2), ("fp8_e4m3", TOKEN + 2 * 2 * 8 * 4)],
)
@pytest.mark.parametrize("page_size", [1, 16, 24])
def test_kv_memory(kv_dtype: Any, token_bytes: int, page_size: int) -> None:
    page = token_bytes * page_size
    for memory, pages in ((page, 1), (7 * page - 1, 6), (7 * page, 7), (7 * page + 1, 7)):
        engine = make(kv_dtype=kv_dtype, page_size=page_size, kv_memory=memory)
        tensors = [t for c in engine.runner.cache for t in (c.k, c.v, c.k_scale, c.v_scale) if t is not None]
        assert engine.allocator.num_pages == engine.runner.num_pages == pages
        assert engine.stats().kv_bytes == pages * page == sum(t.nbytes for t in tensors)
    with pytest.raises(ConfigError, match=f"kv_memory: {page - 1} bytes hold no page, expected {page} or more"):
        make(kv_dtype=kv_dtype, page_size=page_size, kv_memory=page - 1)
    assert make(kv_dtype=kv_dtype, page_size=page_size, num_pages=5).stats().kv_bytes == 5 * page


def test_what_can_never_fit_is_refused() -> None:
    engine = make(page_size=4, num_pages=6)
    assert len(answer(engine, PROMPT, greedy(max_tokens=8)).token_ids) == 8  # 17 + 8 − 1 = 24 in the cache
    with pytest.raises(ValueError, match="17 prompt tokens \\+ 9 new ones need 7 pages of 4 tokens, there are 6"):
        engine.add_request("x", PROMPT, greedy(max_tokens=9))
    with pytest.raises(ValueError, match="prompt has 128 tokens, all of max_model_len"):
        engine.add_request("x", [5] * 128, greedy())
    with pytest.raises(ValueError, match="prompt has 129 tokens, expected at most max_model_len=128"):
        engine.add_request("x", [5] * 129, greedy())
    with pytest.raises(ValueError, match="25 tokens need 7 pages, 6 are free"):
        engine.logits([5] * 25)
    assert not engine.has_unfinished_requests()
    assert engine.allocator.available == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 4}, "unknown option 'max_num_seq', perhaps max_num_seqs: expected one of "),
        ({"model_": 4}, "unknown option 'model_'"),
        ({"num_pages": 0}, r"num_pages=0 is not an integer in 1\.\."),
        ({"num_pages": 4, "kv_memory": 4096}, "num_pages=4 and kv_memory=4096: expected one of them"),
        ({"kv_dtype": "fp8"}, "kv_dtype='fp8' is not one of bfloat16, float32, fp8_e4m3"),
        ({"seed": -1}, "seed=-1"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens=1.5"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)
