"""The Triton attention's splits of the keys: the same bits in one program as in many, and in any batch or chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grok_kernels
from tests.kernels.backends import BACKENDS
from tests.kernels.cases import FP8, batch, ints
from tests.kernels.oracle import assert_near

if "triton" not in BACKENDS:
    pytest.skip("Triton's kernels are not interpreted here", allow_module_level=True)

from grok_kernels.triton import attention

FLAGS = [{}, {"softcap": 5.0, "window": 100, "temperature_len": 64}]


@pytest.fixture(autouse=True)
def _splits_of_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPAN", 128)


def run(args: dict[str, Any], **flags: Any) -> Tensor:
    with grok_kernels.use_backend("triton"):
        return grok_kernels.paged_attention(**args, scale=0.3, **flags)


@pytest.mark.parametrize("flags", FLAGS, ids=["plain", "all"])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8], ids=str)
def test_decode_in_splits(cache_dtype: torch.dtype, flags: dict[str, Any]) -> None:
    lengths = [(1, n) for n in (1, 127, 128, 129, 256, 300)]
    b = batch(lengths, heads=6, groups=1, page=16, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    assert_near(run(b.args, **flags), b.expected(scale=0.3, **flags), rel=2e-5)


@pytest.mark.parametrize("flags", FLAGS, ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_in_a_prompt_a_chunk_and_alone(dtype: torch.dtype, flags: dict[str, Any]) -> None:
    n = 200
    b = batch([(n, n)], heads=6, groups=2, page=16, dtype=dtype)
    whole = run(b.args, **flags)
    for first, end in ((0, 127), (127, 128), (128, n)):
        own = {
            **b.args,
            "q": b.args["q"][first:end],
            "query_start": ints(0, end - first),
            "seq_lens": ints(end),
            "max_query_len": end - first,
        }
        assert torch.equal(run(own, **flags), whole[first:end])
    tokens = [0, 127, 128, n - 1]
    decode = {
        **b.args,
        "q": b.args["q"][tokens],
        "block_table": b.args["block_table"].expand(4, -1).contiguous(),
        "query_start": ints(*range(5)),
        "seq_lens": ints(*(token + 1 for token in tokens)),
        "max_query_len": 1,
    }
    assert torch.equal(run(decode, **flags), whole[tokens])
    mixed = {
        **decode,
        "q": torch.cat((b.args["q"][:1], b.args["q"][120:135], b.args["q"][[128, n - 1]])),
        "query_start": ints(0, 1, 16, 17, 18),
        "seq_lens": ints(1, 135, 129, n),
        "max_query_len": 15,
    }
    assert torch.equal(run(mixed, **flags), whole[[0, *range(120, 135), 128, n - 1]])


def test_a_request_without_keys_gives_zeros_and_padding_is_left_out() -> None:
    b = batch([(1, 200), (1, 5)], page=16)
    args = {**b.args, "seq_lens": ints(200, 0)}
    got = run(args)
    assert not got[1].any()
    assert torch.equal(got[:1], run(b.args)[:1])
