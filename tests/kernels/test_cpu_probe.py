"""The probes of the machine's ceilings: that they do the work they claim. How fast is nobody's business here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import grok_kernels
from grok_kernels import cpu

STATUS = grok_kernels.backends()["rms_norm"]["cpu"]
if not STATUS.available:
    pytest.skip(STATUS.reason, allow_module_level=True)

from grok_kernels import _C  # noqa: E402

KINDS = ("fp32", "bf16", "int8")
SIZES = (0, 1, 7, 8, 9, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097, 3 * 4096 + 5, 1_000_003)


@pytest.fixture(params=cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield str(request.param)


def words_sum(data: np.ndarray) -> int:
    filled = np.concatenate((data, np.zeros(-data.size % 8, np.uint8)))
    return int(filled.view("<u8").sum(dtype=np.uint64))


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_is_read(isa: str, size: int, threads: None) -> None:
    data = torch.randint(0, 256, (size + 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    for start in (0, 3):  # aligned and not
        part = data[start : start + size]
        for count in (1, 2):
            torch.set_num_threads(count)
            assert _C.probe_read(part) == words_sum(part.numpy())


def test_any_type_is_read_but_only_in_one_piece() -> None:
    x = torch.randn(5, 7)
    assert _C.probe_read(x) == words_sum(x.numpy().reshape(-1).view(np.uint8))
    with pytest.raises(ValueError, match=r"strides \[1, 7\]"):
        _C.probe_read(x.t())
    with pytest.raises(ValueError, match="tensor is on meta"):
        _C.probe_read(x.to("meta"))


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_counted(isa: str, kind: str, threads: None) -> None:
    torch.set_num_threads(1)
    once = _C.probe_peak(kind, 1)
    assert once > 0
    assert _C.probe_peak(kind, 37) == 37 * once
    torch.set_num_threads(2)
    assert _C.probe_peak(kind, 37) == 2 * 37 * once
    assert _C.probe_instruction(kind)


def test_arithmetic_without_an_instruction_of_its_own_is_that_of_fp32() -> None:
    """Integers have one on AVX2 and AVX-512 too."""
    for name in cpu.isas():
        with cpu.use_isa(name):
            found = {kind: _C.probe_instruction(kind) for kind in KINDS}
        own = name in ("avx512_bf16", "neon_bf16")
        assert (found["bf16"] == found["fp32"]) is not own
        assert (found["int8"] == found["fp32"]) is not (own or name.startswith("avx"))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='fp4', expected fp32, bf16 or int8"):
        _C.probe_peak("fp4", 1)
    with pytest.raises(ValueError, match="iterations=0, expected at least 1"):
        _C.probe_peak("fp32", 0)
