"""What the compiler makes of the Triton kernels at Grok-1's sizes, for chips that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from tests.kernels.backends import BACKENDS

if "triton" not in BACKENDS:
    pytest.skip("Triton is not installed", allow_module_level=True)

CHIPS = ("h100", "a100", "l40s", "b200", "mi300x")
REGISTERS = {"h100": 255, "a100": 255, "l40s": 255, "b200": 255, "mi300x": 512}


@cache
def kernels(chip: str) -> list[dict[str, Any]]:
    """Every launch of every specimen, compiled for this chip."""
    command = [sys.executable, "-m", "tests.kernels.triton_specimens", "--chip", chip]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(chip: str, specimen: str) -> list[dict[str, Any]]:
    found = [kernel for kernel in kernels(chip) if kernel["specimen"] == specimen]
    assert found, f"{specimen} starts no kernel"
    return found


@pytest.mark.parametrize("chip", CHIPS)
def test_no_kernel_spills_or_is_too_large(chip: str) -> None:
    for kernel in kernels(chip):
        if kernel["specimen"] == "spills":
            continue
        assert kernel["spills"] == 0, kernel
        assert kernel["registers"] <= REGISTERS[chip], kernel


@pytest.mark.parametrize("chip", ["h100", "a100"])
def test_the_check_sees_a_kernel_that_spills(chip: str) -> None:
    assert of(chip, "spills")[0]["spills"] > 0
