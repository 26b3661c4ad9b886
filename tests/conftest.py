"""Read before any test imports torch."""

from __future__ import annotations

import os

# The tests' products are small: beside other load, threads that spin while they wait take several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
