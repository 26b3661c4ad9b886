"""Counters on a GPU: the programs of a launch count themselves, and the last one to end sets the counter back to 0."""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 4096  # counters for captured launches, of which a graph has tens
ALIGNED = 4  # int32 to a counter: Triton compiles a kernel anew for a pointer that is not a multiple of 16 bytes

_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_spare: dict[torch.device, list[Tensor]] = {}
_kept: list[Tensor] = []  # the memory of the spare ones, to which graphs hold addresses alone


def counter(device: torch.device) -> Tensor:
    """(1,) int32, 0, for the next launch on the current stream.

    Launches on one stream run one after another and share a counter. A captured launch may be replayed on any stream
    and gets its own, from a pool made before: filling one during capture would add a launch to every replay.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    spare = _spare.setdefault(device, [])
    if torch.cuda.is_current_stream_capturing():
        return spare.pop() if spare else torch.zeros(1, dtype=torch.int32, device=device)
    if len(spare) < SPARE // 2:
        zeros = torch.zeros((SPARE, ALIGNED), dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # other streams will use them
        _kept.append(zeros)
        spare += zeros[:, :1].unbind()
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _of_stream:
        _of_stream[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _of_stream[key]
