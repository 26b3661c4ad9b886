"""rms_norm of the native CPU backend: against the reference, and the same bits from every instruction set."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import cpu, registry
from tests.kernels.backends import ISAS

ARM = platform.machine() in ("aarch64", "arm64")
KNOWN = "neon_bf16, neon, portable" if ARM else "avx512_bf16, avx512_vnni, avx512, avx2, portable"

STATUS = grok_kernels.backends()["rms_norm"]["cpu"]
pytestmark = pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
DTYPES = (torch.float32, torch.bfloat16)
SIZES = (1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 100, 127, 1000, 6144)
EPS = 1e-5


def native(x_TD: Tensor, weight_D: Tensor, eps: float = EPS) -> Tensor:
    with grok_kernels.use_backend("cpu"):
        return grok_kernels.rms_norm(x_TD, weight_D, eps)


def reference(x_TD: Tensor, weight_D: Tensor, eps: float = EPS) -> Tensor:
    with grok_kernels.use_backend("reference"):
        return grok_kernels.rms_norm(x_TD, weight_D, eps)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ordinal(x: Tensor) -> Tensor:
    """bf16 as integers in the order of the numbers, one apart where the values are neighbours; both zeros are 0."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    whole = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    keep = ~a.isnan()  # which of two NaNs survives an addition differs with the order of an instruction's operands
    assert torch.equal(a.contiguous().view(whole)[keep], b.contiguous().view(whole)[keep])


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    keep = expected.isfinite()
    got, expected = got[keep], expected[keep]
    if not got.numel():
        return
    if got.dtype == torch.bfloat16:
        apart = (ordinal(got) - ordinal(expected)).abs()
        assert apart.max() <= 1
        assert (apart == 0).float().mean() > 0.99 or apart.sum() <= 1
    else:
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_matches_the_reference(isa: str, d: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = random(5, d, dtype=dtype), random(d, dtype=weight_dtype, seed=1)
    assert_close(native(x, weight), reference(x, weight))


def test_error_against_fp64(isa: str) -> None:
    x, weight = random(8, 6144, dtype=torch.float32), random(6144, dtype=torch.float32, seed=1)
    exact = x.double() * weight * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert ((native(x, weight) - exact).abs() / exact.abs()).max() < 5e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "d"), [(0, 64), (0, 0), (3, 0), (1, 1)])
def test_nothing_or_one_element(isa: str, t: int, d: int, dtype: torch.dtype) -> None:
    x, weight = random(t, d, dtype=dtype), random(d, dtype=dtype, seed=1)
    assert_close(native(x, weight), reference(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_leave_the_padding_unread(isa: str, dtype: torch.dtype) -> None:
    weight = random(37, dtype=torch.float32, seed=1)
    wide = torch.full((9, 64), float("nan"), dtype=dtype)
    wide[:, 5:42] = random(9, 37, dtype=dtype)
    x = wide[::2, 5:42]
    assert_same_bits(native(x, weight), native(x.contiguous(), weight))
    assert_same_bits(native(x[:1].expand(4, -1), weight), native(x[:1].repeat(4, 1), weight))
    column = wide[:, 5:6]  # D = 1: the last dimension's stride means nothing
    assert_same_bits(native(column.t().contiguous().t(), weight[:1]), native(column.contiguous(), weight[:1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [3, 40, 6144])
def test_nan_inf_and_extremes(isa: str, d: int, dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    x = random(9, d, dtype=dtype)
    for row, value in enumerate((nan, inf, -inf, 0.0, 3e38, 1e30, 1e-30, 1e-45)):
        x[row, d // 2] = value
    x[4] = 0.0
    weight = random(d, dtype=torch.float32, seed=1)
    weight[0], weight[1] = inf, nan
    assert_close(native(x, weight), reference(x, weight))
    assert_close(native(x, weight, 0.0), reference(x, weight, 0.0))


def test_bf16_rounds_to_nearest_even(isa: str) -> None:
    """With rows of ±1 and eps 0 the norm is 1, so the result is the weight, rounded."""
    bits = torch.arange(0, 1 << 32, 65521).to(torch.int32)  # odd stride: every half of bf16 and every kind of tail
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF], dtype=torch.int32)
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32)
    weight = torch.cat((bits, ties, nans)).view(torch.float32)
    got = native(torch.ones(1, weight.numel(), dtype=torch.bfloat16), weight, 0.0)[0]
    expected = weight.bfloat16()
    assert torch.equal(got.isnan(), weight.isnan())
    keep = ~weight.isnan() & ((weight.abs() >= 2.0**-126) | (weight == 0))  # torch may run with denormals flushed
    assert torch.equal(got[keep].view(torch.int16), expected[keep].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_same_bits_from_every_instruction_set_batch_and_thread_count(d: int, dtype: torch.dtype, threads: None) -> None:
    t = max(3, 4 * 32768 // d) if d > 1000 else 70
    x, weight = random(t, d, dtype=dtype), random(d, dtype=torch.bfloat16, seed=1)
    x[1, 0] = float("inf")
    torch.set_num_threads(1)
    with cpu.use_isa("portable"):
        expected = native(x, weight)
    for name in ISAS:
        with cpu.use_isa(name):
            for count in (1, 2):
                torch.set_num_threads(count)
                assert_same_bits(native(x, weight), expected)
            for row in (0, t // 2, t - 1):
                assert_same_bits(native(x[row : row + 1], weight), expected[row : row + 1])


@pytest.mark.skipif(sys.platform != "linux", reason="built with OpenMP on Linux")
def test_rows_really_run_in_parallel(threads: None) -> None:
    from grok_kernels import _C

    for count in (1, 2):
        torch.set_num_threads(count)
        assert _C.parallel_threads(8) == count


def test_the_op_reaches_it_through_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(3, 64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)
    monkeypatch.delenv(registry.ENV, raising=False)
    monkeypatch.setattr(registry, "_chosen", {})
    got = torch.ops.grok.rms_norm(x, weight, EPS)
    assert grok_kernels.chosen() == {"rms_norm": ("cpu",)}
    assert_same_bits(got, native(x, weight))
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.setenv(registry.ENV, "reference")
    torch.ops.grok.rms_norm(x, weight, EPS)
    assert grok_kernels.chosen() == {"rms_norm": ("reference",)}


def test_gradients_go_to_the_reference() -> None:
    x, weight = random(3, 64, dtype=torch.float32).requires_grad_(), random(64, dtype=torch.float32)
    grok_kernels.rms_norm(x, weight).sum().backward()
    assert x.grad is not None


def test_the_native_op_checks_what_memory_safety_needs() -> None:
    from grok_kernels import _C

    x, weight = random(3, 8, dtype=torch.float32), random(8, dtype=torch.float32)
    op = _C.rms_norm
    with pytest.raises(ValueError, match=r"weight has shape \[5\].*D=8"):
        op(x, weight[:5], EPS)
    with pytest.raises(ValueError, match="x has dtype Half"):
        op(x.half(), weight, EPS)
    with pytest.raises(ValueError, match=r"strides \[1, 8\]"):
        op(x.t(), weight[:3], EPS)
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        op(weight, weight, EPS)


def test_forced_instruction_sets() -> None:
    assert ISAS[-1] == "portable"
    before = cpu.isa()
    with cpu.use_isa("portable"):
        assert cpu.isa() == "portable"
    assert cpu.isa() == before
    match = f"isa='sse9' is not an instruction set: expected one of {KNOWN}"
    with pytest.raises(ValueError, match=match), cpu.use_isa("sse9"):
        pass


@pytest.mark.parametrize("value", ["portable", "sse9"])
def test_environment_forces_the_instruction_set(value: str) -> None:
    code = "import grok_kernels.cpu as c\ntry: print(c.isa())\nexcept ValueError as e: print(e)"
    path = str(Path(grok_kernels.__file__).parents[1])
    env = {**os.environ, "GROK_CPU_ISA": value, "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    if value == "portable":
        assert out.strip() == "portable"
    else:
        assert f"GROK_CPU_ISA='sse9' is not an instruction set: expected one of {KNOWN}" in out


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs x86-64 and objdump")
def test_wide_registers_are_used_where_dispatched_and_nowhere_else() -> None:
    from grok_kernels import _C

    text = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", str(_C.__file__)], capture_output=True, text=True, check=True
    ).stdout
    widest: dict[str, set[str]] = {}
    for function in re.split(r"\n(?=[0-9a-f]+ <)", text):
        registers = set(re.findall(r"%([yz])mm", function))
        if registers:
            widest[function.split("\n", 1)[0]] = registers
    assert all("avx512" in name or "avx2" in name for name in widest), sorted(widest)
    norms = {name: found for name, found in widest.items() if "rms_norm_avx" in name}
    assert len(norms) == 8
    assert all("z" in found for name, found in norms.items() if "_avx512<" in name)
    assert all(found == {"y"} for name, found in norms.items() if "_avx2<" in name)
