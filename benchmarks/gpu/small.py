"""Every op of one backend, once, against the reference: python -m benchmarks.gpu.small BACKEND [--few].

With GROK_TEST_DEVICE=cpu:0 tensors are made and compared on the CPU at tiny sizes, so that only the tested kernels run
on the GPU: compute-sanitizer can follow each access. With GROK_TEST_DEVICE=cuda they are made on the GPU, at sizes
(GROK_TEST_SHRINK) that fill it and wrap around the kernels' pipelines, and the first row must have the same bits alone
and among others. Each call is named before it starts: what hangs or faults is the last one named. Status 3 if numbers
are wrong, 1 if a call fails or the backend takes none.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch

import torch
from torch import Tensor

import grok_kernels
from grok_bench.kernels.case import error
from tests.gpu.full_size import CALLS, DEVICE, ON_GPU, Call
from tests.kernels.on_device import carried

from .run import SKIPPED, WRONG

TOKENS, FEW = (1, 5, 65, 200), (1, 65)
BOUND = 2e-2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("backend")
    parser.add_argument("--few", action="store_true", help="two sizes, not four")
    parser.add_argument("--call", default="*", metavar="PATTERN", help="only calls whose names match")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="only the I-th of N parts of them, from 0")
    parser.add_argument("--on", default="cuda", help="where the ops run")
    a = parser.parse_args()
    if a.on == "cuda" and not torch.cuda.is_available():
        print("there is no GPU")
        return SKIPPED
    served, wrong, refused = 0, list[str](), set[str]()
    part, parts = map(int, a.part.split("/"))
    for c in [c for c in CALLS if fnmatch(c.name, a.call)][part::parts]:
        for t in FEW if a.few else TOKENS:
            print(f"{c}, {t} tokens", end=" ", flush=True)
            with torch.inference_mode():
                try:
                    found = _differences(c, t, a.backend, a.on)
                except NotImplementedError as error:
                    refused.add(f"{c}: {error}")
                    print("not taken")
                    continue
            served += 1
            wrong += found
            print(*found or ["right"], flush=True)
    print("\n".join(sorted(refused)))
    if not served:
        print(f"the {a.backend} backend takes none of these calls")
        return 1
    right = f"{served} calls of the {a.backend} backend are right"
    print(f"{len(wrong)} WRONG: {'; '.join(wrong)}" if wrong else right)
    return WRONG if wrong else 0


def _differences(c: Call, t: int, backend: str, on: str) -> list[str]:
    """What is wrong with this call. NotImplementedError where the backend does not take it."""
    args, again = c.make(t, 1), c.make(t, 1)  # some are written in place
    with grok_kernels.use_backend(backend):
        if ON_GPU:
            got = c(args)
        else:
            found = carried(getattr(grok_kernels, c.op), on)(**args)
            got = (*(found if isinstance(found, tuple) else (found,)), *(args[name] for name in c.written))
    with grok_kernels.use_backend("reference"):
        expected = c(again)
    wrong = [
        f"{c}, {t} tokens: off by {off:.1e}"
        for a, b in zip(got, expected, strict=True)
        if not (off := error(a.float(), b.float())) <= (0.0 if a.dtype in (torch.int32, torch.int64) else BOUND)
    ]
    if ON_GPU and c.rows and t > 1:
        own = c.part(args, slice(0, 1))
        if c.op == "paged_attention":
            own["query_start"] = args["query_start"][:2]
        with grok_kernels.use_backend(backend):
            alone = c(own)
        if any(len(a) == 1 and not torch.equal(_bits(a), _bits(b[:1])) for a, b in zip(alone, got, strict=True)):
            wrong.append(f"{c}, {t} tokens: the first row has other bits alone")
    return wrong


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


if __name__ == "__main__":
    print(f"tensors are made on {DEVICE}")
    sys.exit(main())
