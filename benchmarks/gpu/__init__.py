"""`make bench-gpu`: on a machine with a GPU, the kernels proved and measured, in two parts of a few minutes each."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]  # where the packages lie in a checkout
sys.path[:0] = [path for path in PATHS if path not in sys.path]
