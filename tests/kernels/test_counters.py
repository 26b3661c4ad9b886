"""Which launches share a counter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from grok_kernels import counters


def test_launches_of_a_stream_share_one_and_those_in_graphs_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(stream=7, capturing=False, waited=0)

    def zeros(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def synchronize() -> None:
        now.waited += 1

    cuda = SimpleNamespace(
        is_current_stream_capturing=lambda: now.capturing,
        current_stream=lambda device: SimpleNamespace(cuda_stream=now.stream, synchronize=synchronize),
    )
    monkeypatch.setattr(counters, "torch", SimpleNamespace(zeros=zeros, int32=torch.int32, cuda=cuda))
    monkeypatch.setattr(counters, "SPARE", 4)
    for name, empty in (("_of_stream", {}), ("_spare", {}), ("_kept", [])):
        monkeypatch.setattr(counters, name, empty)
    device = torch.device("cuda", 0)

    first = counters.counter(device)
    assert (first.dtype, first.tolist(), now.waited) == (torch.int32, [0], 1)
    assert counters.counter(device) is first
    now.stream = 8
    assert counters.counter(device) is not first
    now.capturing = True
    own = [counters.counter(device) for _ in range(4)]
    addresses = {c.data_ptr() for c in own}
    assert len(addresses) == 4
    assert {address % 16 for address in addresses} == {own[0].data_ptr() % 16}
    kept = counters._kept[0].data_ptr()
    assert all(kept <= address < kept + 4 * 16 for address in addresses)
    assert counters.counter(device).data_ptr() not in addresses  # none is left: one that the graph clears itself
    now.capturing = False
    counters.counter(device)
    now.capturing = True
    assert counters._kept[1].data_ptr() <= counters.counter(device).data_ptr()
    assert now.waited == 2
