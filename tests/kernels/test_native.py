"""The native functions are safe to call with anything, by anybody, at any time: see `native_fuzz`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from grok_kernels import registry

pytestmark = pytest.mark.skipif("cpu" in registry._missing, reason="no native CPU kernels")

if "cpu" not in registry._missing:
    from grok_kernels import _C
    from tests.kernels import native_fuzz


def test_fuzzed_calls(threads: None) -> None:
    succeeded = sum(native_fuzz.try_call(7, number) for number in range(400))
    assert 100 < succeeded < 300


def rope(g: int = 2, **changed: Any) -> Tensor:
    """A valid call but for what is changed. Pages (4, G, 8, 16)."""
    q, pages = torch.ones(3, 2 * g, 16), torch.zeros(2, 4, g, 8, 16)
    args = {
        "q": q, "k": torch.ones(3, g, 16), "v": torch.ones(3, g, 16), "k_cache": pages[0], "v_cache": pages[1],
        "positions": torch.arange(3, dtype=torch.int32), "slots": torch.arange(3, dtype=torch.int32),
        "cos_sin": torch.ones(8, 16), "k_scale": None, "v_scale": None,
    }  # fmt: skip
    return _C.rope_store_kv(**args | changed)


def test_caches_that_share_memory_are_refused() -> None:
    pages = torch.zeros(4, 2, 2, 8, 16)  # keys and values of a page side by side
    rope(k_cache=pages[:, 0], v_cache=pages[:, 1])
    rope(k_cache=pages[..., :8, :].transpose(1, 2)[:, :, 0], v_cache=pages[..., :8, :].transpose(1, 2)[:, :, 1])
    whole = pages[:, 0]
    with pytest.raises(ValueError, match="rope_store_kv: k_cache and v_cache lie in the same memory"):
        rope(k_cache=whole, v_cache=whole)
    flat = torch.zeros(4 * 2 * 8 * 16 * 2)
    shape, strides = (4, 2, 8, 16), (256, 128, 16, 1)
    for offset, apart in ((1, False), (16, False), (1023, False), (1024, True)):
        caches = {"k_cache": flat.as_strided(shape, strides), "v_cache": flat.as_strided(shape, strides, offset)}
        if apart:
            rope(**caches)
            continue
        with pytest.raises(ValueError, match="lie in the same memory"):
            rope(**caches)
    for strides in ((0, 128, 16, 1), (128, 128, 16, 1), (256, 16, 16, 1), (256, 128, 15, 1)):
        cache = torch.zeros(2048).as_strided(shape, strides)
        with pytest.raises(ValueError, match=r"k_cache has shape .* expected elements that share no memory"):
            rope(k_cache=cache, v_cache=torch.zeros(shape))
    q = torch.zeros(4, 2, 8, 16)
    with pytest.raises(ValueError, match="k_cache and k lie in the same memory, and k_cache is written"):
        rope(k_cache=q, k=q.view(-1)[: 3 * 2 * 16].view(3, 2, 16))


def test_a_weight_is_not_packed_into_itself() -> None:
    room = torch.zeros(2 * 64 * 64, dtype=torch.int8)
    packed = room[: 64 * 64].view(1, 1, 16, 4, 16, 4)
    _C.pack_into(room[64 * 64 :].view(1, 64, 64), packed, 0)
    with pytest.raises(ValueError, match="pack_into: packed and weight lie in the same memory"):
        _C.pack_into(room[64 * 63 : 64 * 127].view(1, 64, 64), packed, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: _C.quantize_int8(x, -1), "quantize_int8: group_size=-1"),
        (lambda x: _C.rms_norm(x.to_sparse(), x[0], 1e-5), "rms_norm: x has the dispatch keys .*Sparse"),
        (lambda x: _C.rms_norm(torch._efficientzerotensor((2, 8)), x[0], 1e-5), "x has the dispatch keys .*ZeroTensor"),
        (lambda x: _C.rms_norm(torch._neg_view(x), x[0], 1e-5), "x has the dispatch keys .*Negative"),
        (lambda x: _C.probe_peak("fp32", 2**62), "iterations=4611686018427387904, expected at most"),
        (lambda x: _C.parallel_threads(-1), "tasks=-1, expected 0"),
    ],
)
def test_refuses(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 8))


def test_a_group_of_any_size_is_taken() -> None:
    """d + group − 1 once overflowed."""
    x = torch.randn(2, 100)
    for a, b in zip(_C.quantize_int8(x, 2**63 - 1), _C.quantize_int8(x, 0), strict=True):
        assert torch.equal(a, b)


def test_indices_may_be_written_to_meanwhile() -> None:
    """They are copied before they are checked. A page or an expert that appeared after the check was read out of
    bounds, which ended the process."""
    b, columns, done = 64, 64, threading.Event()
    q, cache = torch.ones(b, 1, 16), torch.ones(columns, 1, 4, 16)
    table = torch.zeros(b, columns, dtype=torch.int32)
    starts, lens = torch.arange(b + 1, dtype=torch.int32), torch.full((b,), 4 * columns, dtype=torch.int32)
    experts = torch.zeros(256, 2, dtype=torch.int32)

    def write() -> None:
        while not done.is_set():
            for value in (2**30, 0):
                table.fill_(value)
                experts.fill_(value)

    thread = threading.Thread(target=write)
    thread.start()
    outcomes = set()
    try:
        for _ in range(300):
            with suppress(ValueError):
                _C.paged_attention(q, cache, cache, table, starts, lens, 1, 1.0, 0.0, 0, 0, None, None)
                outcomes.add("attention")
            with suppress(ValueError):
                _C.group_tokens(experts, 8)
                outcomes.add("grouping")
    finally:
        done.set()
        thread.join()
    assert outcomes
