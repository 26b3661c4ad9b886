"""Which kernels to profile, and one call of one, marked for a profiler: PROBLEM CONTESTANT [--device cpu]."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from math import inf
from pathlib import Path

import torch

from grok_bench import schema
from grok_bench.kernels import lineup

from .run import SKIPPED

COUNT = 3
LEAST = 2e-5  # seconds of the floor: below, the launch dominates, and a profile says no more


def slowest(file: Path, count: int = COUNT) -> list[tuple[str, str]]:
    """(problem, backend) where the best of ours has the least share of the roofline in a result file."""
    found: list[tuple[float, str, str]] = []
    for result in schema.load(file).kernels:
        ours = [s for s in result.scores if s.ours and s.roofline is not None and "reference" not in s.contestant]
        if ours and (result.floor_seconds or 0.0) >= LEAST:
            best = max(ours, key=lambda s: s.roofline or 0.0)
            found.append((best.roofline or 0.0, result.problem, best.contestant))
    return [(problem, contestant) for _, problem, contestant in sorted(found)[:count]]


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profile", description=__doc__)
    parser.add_argument("problem")
    parser.add_argument("contestant")
    parser.add_argument("--device", default="cuda")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU")
        return SKIPPED
    one = lineup.enter(a.problem, a.contestant, a.device, False, (), inf)
    c, where, inputs = one.contestant, one.device, one.case.inputs[0]
    with c.within():
        call = c.bind(c.instead(inputs) if c.instead else inputs)
        call()
        where.flush()
        where.synchronize()
        with torch.cuda.profiler.profile() if where.kind == "cuda" else nullcontext():
            call()
            where.synchronize()
    print(f"{a.problem} by {a.contestant}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
