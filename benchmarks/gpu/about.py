"""The GPU, what runs on it, and how it compares with what `grok-engine plan` assumes. Status 77 where there is none."""

from __future__ import annotations

import shutil
import sys

import torch

import grok_kernels
from grok_bench.environment import environment
from grok_engine.chips import CHIPS

from .run import SKIPPED

TOOLS = ("nvcc", "ncu", "compute-sanitizer", "c++")


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no GPU")
        return SKIPPED
    about = environment("cuda")
    for name in ("chip", "driver", "clock_mhz", "torch", "triton", "python", "commit", "dirty", "cores"):
        print(f"{name:10} {getattr(about, name)}")
    for tool in TOOLS:
        print(f"{tool:10} {shutil.which(tool) or 'not on the path'}")
    total = torch.cuda.get_device_properties(0).total_memory
    for chip in CHIPS.values():
        if chip.name.split("-")[0] in about.chip.lower():
            print(f"plan       {chip.name}: {chip.memory / total:.3f} times this one's memory")
    for backend in ("triton", "cuda"):
        missing = {s[backend].reason for s in grok_kernels.backends().values() if not s[backend].available}
        print(f"{backend:10} {'; '.join(sorted(missing)) or 'serves every op'}")
    print(f"{about.chip}, driver {about.driver}, torch {about.torch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
