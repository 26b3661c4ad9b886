"""sample_top_p over vocabularies of several blocks, whose lists grow short in different ways, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels.triton import sample as kernel
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS, serving
from tests.kernels.oracle import f64

if "triton" not in BACKENDS:
    pytest.skip("Triton is not installed", allow_module_level=True)

V = 2 * kernel.LONG_BLOCK + 1027
UNIFORM = (0.3, 0.77, 1 - 2.0**-24)


def rows() -> dict[str, Tensor]:
    normal = torch.randn(V, generator=torch.Generator().manual_seed(0))
    few = torch.full((V,), -float("inf"))
    few[[5, kernel.BLOCK, kernel.LONG_BLOCK + 3, V - 1]] = torch.tensor([1.0, 1.0, 1.5, 1.0])
    return {
        "normal": normal,
        "spread as a model's": normal * 3 - normal.abs() * 4,
        "rounded": (normal * 4).round() / 4,
        "in bf16": normal.bfloat16(),
        "all equal": torch.zeros(V),
        "zeros of both signs": torch.where(normal > 0, 0.0, -0.0),
        "few": few,
        "neighbours in fp32": 1 + torch.randint(3, (V,), generator=torch.Generator().manual_seed(1)) * 2.0**-23,
        "one far above": torch.where(torch.arange(V) == kernel.LONG_BLOCK, 1e30, normal),
        "far apart": normal * 1e30,
    }


@pytest.mark.parametrize("name", rows())
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1e30, 0.3)])
def test_long_rows(name: str, temperature: float, top_p: float) -> None:
    logits = rows()[name]
    b = len(UNIFORM)
    chance = [torch.full((b,), temperature), torch.full((b,), top_p), torch.tensor(UNIFORM)]
    with serving("triton"):
        found = grok_kernels.sample_top_p(logits.expand(b, V).contiguous(), *chance).tolist()
    exact = [float(torch.tensor(x)) for x in (temperature, top_p)]  # as fp32
    assert found == [oracle.sample(f64(logits), *exact, float(u)) for u in chance[2]]
