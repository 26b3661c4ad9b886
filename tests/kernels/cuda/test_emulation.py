"""The emulated Hopper itself: tiles, barriers and products do what they should, and a broken rule is named."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.kernels.cases import FP8, randn
from tests.kernels.cuda.emulation import HERE, call, compiled
from tests.kernels.oracle import f64

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("emulation")
    return compiled(folder / "checks.so", HERE / "emulation_checks.cpp", optimise="-O1")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("k", [16, 144, 256])  # what lies past K is zero
def test_a_product_through_tiles(machine: ctypes.CDLL, k: int, cluster: bool, seed: int) -> None:
    blocks, rows = (2, 128) if cluster else (1, 61)  # of 61 rows the tile's others are not written
    a, b = randn(64, k).to(FP8), randn(64, k, seed=1).to(FP8)
    scale, sums = randn(32, seed=2), torch.zeros(64 * blocks, 64)
    y = torch.full((64 * blocks, 64), 7.0, dtype=torch.bfloat16)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, scale, sums, y)]
    call(machine.multiply_once, *pointers, *map(ctypes.c_int64, (rows, k)), int(cluster), ctypes.c_uint64(seed))
    scale[20:] = 0.0  # copies that are not valid write zeros
    exact = np.tile(f64(a) @ f64(b).T * f64(scale).repeat(2).reshape(32, 2).T.reshape(1, 64), (blocks, 1))
    assert np.allclose(f64(sums), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[:rows, :56], sums[:rows, :56].bfloat16())
    assert (y[rows:] == 7.0).all()
    assert (y[:, 56:] == 7.0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_product_with_one_operand_in_registers(machine: ctypes.CDLL, seed: int) -> None:
    a, b = randn(64, 64, dtype=torch.bfloat16), randn(16, 64, seed=1, dtype=torch.bfloat16)
    y = torch.zeros(16, 64, dtype=torch.bfloat16)
    call(machine.multiply_registers, *(ctypes.c_void_p(x.data_ptr()) for x in (a, b, y)), ctypes.c_uint64(seed))
    assert torch.equal(y, torch.from_numpy(f64(b) @ f64(a).T).float().bfloat16())


RULES = {
    "waits_in_vain": "deadlock:\n  block 0 thread 0 (warp 0) and 127 more wait for barrier full, parity 0 (0 of 1",
    "waits_for_bytes": "barrier full, parity 0 (1 of 1 arrivals came, 64 bytes are missing)",
    "arrives_too_often": "mbarrier.arrive: more arrivals than the 1 of barrier full",
    "forgets_to_initialise": "mbarrier.arrive: no barrier was initialised at shared offset",
    "writes_past_the_end": "a thread wrote past its shared memory",
    "writes_far_past_the_end": "out-of-bounds access to shared memory, 131072 bytes from its start (it has",
    "loads_into_another_place": "cp.async.bulk.tensor (load): 8192 bytes at",
    "misaligned_tile": "a tile at shared offset 128, expected a multiple of 1024",
    "multiplies_without_a_fence": "no fence_products since",
    "multiplies_what_is_not_fenced": "wgmma: thread 77 wrote shared offset 4960 and did not call fence_async",
    "stores_what_is_not_fenced": "and did not call fence_async after it",
    "reads_while_in_flight": "d is NaN while in flight",
    "writes_while_in_flight": "accumulator 7 was written while products (wgmma) were in flight",
    "ends_with_products": "ended with products (wgmma) in flight",
    "ends_with_copies": "ended with copies (cp.async) in flight",
    "multiplies_with_one_warp": "wgmma.fence of warp",
    "mixes_operands": "wgmma: its operands differ from those of other threads of warpgroup 0",
    "claims_too_much": "256 registers a thread (setmaxnreg)",
}


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_named(machine: ctypes.CDLL, rule: str, seed: int) -> None:
    with pytest.raises(RuntimeError) as error:
        call(machine.break_rule, rule.encode(), ctypes.c_uint64(seed))
    assert RULES[rule] in str(error.value)
    assert str(error.value).startswith("check of a rule: ")


def test_conversions_round_as_ml_dtypes_do(machine: ctypes.CDLL) -> None:
    machine.converted.argtypes, machine.converted.restype = (ctypes.c_float,), ctypes.c_uint32
    steps = np.arange(0, 2**16, 7, dtype=np.uint32) << 16
    inputs = np.concatenate((steps, steps | 0x8000, steps | 0x8001)).view(np.float32)
    got = np.array([machine.converted(float(x)) for x in inputs[~np.isnan(inputs)]], dtype=np.uint32)
    x = inputs[~np.isnan(inputs)]
    assert np.array_equal((got >> 16).astype(np.uint16), x.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.array_equal(
        (got & 0xFF).astype(np.uint8), np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )
    assert machine.converted(float("nan")) & 0x7FFF007F == 0x7FFF007F


def test_sums_of_bf16_and_permuted_bytes(machine: ctypes.CDLL) -> None:
    machine.sum_bf16.restype = machine.permuted.restype = ctypes.c_uint32
    x, y = randn(500, dtype=torch.bfloat16), randn(500, seed=1, dtype=torch.bfloat16)
    bits = [t.view(torch.int32).tolist() for t in (x, y, x + y)]
    assert all(
        machine.sum_bf16(a & 0xFFFFFFFF, b & 0xFFFFFFFF) == c & 0xFFFFFFFF for a, b, c in zip(*bits, strict=True)
    )
    assert machine.permuted(0x33221100, 0x77665544, 0x4726) == 0x44772266
