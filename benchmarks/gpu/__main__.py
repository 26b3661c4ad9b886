"""python -m benchmarks.gpu [--out FOLDER] [--only STAGE ...] [--list] [PROBLEM ...]: all that waits for a GPU, one stage after another."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from datetime import date
from pathlib import Path

import torch

from .run import Outcome, run, summary
from .stages import ROOT, stages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "patterns", nargs="*", metavar="PROBLEM", help="of `grok-engine bench kernels`; @cuda-quick if not given"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="where results are kept")
    parser.add_argument("--only", action="append", metavar="STAGE", help="run this stage; may be given more than once")
    parser.add_argument("--list", action="store_true", help="print the stages and their limits")
    a = parser.parse_args()
    os.chdir(ROOT)
    name = f"{_slug()}-{date.today().isoformat()}"
    all_stages = stages(name, a.out, a.patterns)
    if a.list:
        for stage in all_stages:
            print(f"{stage.name:20} at most {stage.limit:g} s{', must pass' if stage.correctness else ''}")
        return 0
    unknown = [only for only in a.only or () if only not in [stage.name for stage in all_stages]]
    if unknown:
        parser.error(f"no stage {unknown[0]!r}: expected one of {', '.join(stage.name for stage in all_stages)}")
    if not torch.cuda.is_available():
        print("bench-gpu: there is no GPU", file=sys.stderr)
        return 2
    logs = a.out / f"{name}-logs"
    logs.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.monotonic(), list[Outcome]()
    for stage in all_stages:
        if not a.only or stage.name in a.only:
            outcomes += run(stage, logs)
    print("\n".join(summary(outcomes)))
    print(f"   {time.monotonic() - began:.0f} s in all; results {a.out / name}*.json, output in {logs}")
    return 1 if any(o.bad for o in outcomes) else 0


def _slug() -> str:
    """The chip's name in a file's."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
