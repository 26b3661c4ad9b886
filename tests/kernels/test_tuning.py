"""Which chip a GPU is taken for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from grok_kernels import chips, tuning
from grok_kernels.chips import CHIPS, chip_name, chip_of


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 NVL", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GH200 480GB", "nvidia-gh200-480gb"),
        ("NVIDIA L40", "nvidia-l40"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_names(says: str, name: str) -> None:
    assert chip_name(says) == name


@pytest.mark.parametrize(("says", "name"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200")])
def test_a_hopper_is_the_chip_that_it_says(says: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(
        name=says, major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    chips._read.cache_clear()
    try:
        assert chip_of(torch.device("cuda", 0)) == CHIPS[name]
    finally:
        chips._read.cache_clear()


def test_the_kernels_are_cut_for_an_h200_as_for_an_h100_until_it_is_measured() -> None:
    h100, h200 = CHIPS["h100"], CHIPS["h200"]
    gemms = [tuning.default_gemm("e4m3", torch.float8_e4m3fn, chip) for chip in (h100, h200)]
    assert gemms[0] == gemms[1]
    assert tuning.attention("bf16", torch.bfloat16, h100) == tuning.attention("bf16", torch.bfloat16, h200)
    assert (h100.arch, h100.multiprocessors, h100.shared_bytes) == (h200.arch, h200.multiprocessors, h200.shared_bytes)
