"""Read before any test imports torch."""

from __future__ import annotations

import os

# The tests' products are small: beside other load, threads that spin while they wait take several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Triton's kernels run on the CPU, interpreted, unless the tests are to run on a GPU. Triton reads this at import.
if os.environ.get("GROK_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
