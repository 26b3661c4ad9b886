"""One contestant's call of one problem, marked for a profiler: PROBLEM CONTESTANT."""

from __future__ import annotations

import sys

import torch

from grok_bench.kernels import cases, contestant
from grok_bench.kernels.device import device
from grok_bench.kernels.problems import select

from .run import SKIPPED


@torch.inference_mode()
def main(problem: str, name: str) -> int:
    if not torch.cuda.is_available():
        print("there is no GPU")
        return SKIPPED
    contestant.load()
    (found,) = select([problem])
    where = device("cuda", probed=False)
    (c,) = (c for c in contestant.entrants(found, where.kind, ["*"]) if c.name == name)
    case = cases.build(found, where.name, where.cold)
    inputs = c.instead(case.inputs[0]) if c.instead else case.inputs[0]
    with c.within():
        call = c.bind(inputs)
        call()
        where.flush()
        where.synchronize()
        torch.cuda.profiler.start()
        call()
        where.synchronize()
        torch.cuda.profiler.stop()
    print(f"{problem} by {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
