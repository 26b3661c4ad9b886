"""One contestant's call of one problem, marked for a profiler: PROBLEM CONTESTANT [--device cpu]."""

from __future__ import annotations

import argparse
import sys

import torch

from grok_bench.kernels import cases, contestant, lineup
from grok_bench.kernels.device import device
from grok_bench.kernels.problems import select

from .run import SKIPPED


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.once", description=__doc__)
    parser.add_argument("problem")
    parser.add_argument("contestant")
    parser.add_argument("--device", default="cuda")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU")
        return SKIPPED
    lineup.load()
    (found,) = select([a.problem])
    where = device(a.device, probed=False)
    (c,) = (c for c in contestant.entrants(found, where.kind, ["*"]) if c.name == a.contestant)
    case = cases.build(found, where.name, where.cold)
    inputs = c.instead(case.inputs[0]) if c.instead else case.inputs[0]
    with c.within():
        call = c.bind(inputs)
        call()
        where.flush()
        where.synchronize()
        if where.kind == "cuda":
            torch.cuda.profiler.start()
        call()
        where.synchronize()
        if where.kind == "cuda":
            torch.cuda.profiler.stop()
    print(f"{a.problem} by {a.contestant}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
