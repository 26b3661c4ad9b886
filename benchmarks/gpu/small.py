"""Every op that the cuda backend has, at small sizes on the GPU: for compute-sanitizer, which follows each access.

All tensors are made and compared on the CPU, so that no kernels run on the GPU but those to be looked at.
"""

from __future__ import annotations

import sys

import torch

import grok_kernels
from tests.gpu.full_size import CALLS
from tests.kernels.on_device import carried

from .run import SKIPPED

TOKENS, FEW = (1, 5, 65, 200), (1, 65)
BOUND = 2e-2


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no GPU")
        return SKIPPED
    served, wrong, refused = 0, [], set()
    for c in CALLS:
        function = carried(getattr(grok_kernels, c.op), "cuda")
        for t in FEW if "--few" in sys.argv else TOKENS:
            with torch.inference_mode():
                args = c.make(t, 1)
                try:
                    with grok_kernels.use_backend("cuda"):
                        got = function(**args)
                except NotImplementedError as error:
                    refused.add(f"{c}: {error}")
                    continue
                expected = getattr(grok_kernels, c.op)(**args)
            served += 1
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True):
                error_of = torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float()).clamp(min=1e-30)  # fmt: skip
                if not error_of <= BOUND:
                    wrong.append(f"{c}, {t} tokens: off by {error_of:.1e}")
    for line in sorted(refused):
        print(line)
    print("\n".join(wrong) or f"{served} calls of the cuda backend are right")
    if not served:
        print("the cuda backend takes none of these calls")
        return SKIPPED
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
