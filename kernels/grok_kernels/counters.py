"""Zeros on a GPU with which the programs of a launch count who ends last, and which the last one leaves as zeros."""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 4096  # launches in graphs; those of one graph are tens
ALIGNED = 4  # numbers: 16 bytes, by which Triton compiles a kernel anew where a pointer is not at a multiple of them

_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_spare: dict[torch.device, list[Tensor]] = {}
_kept: list[Tensor] = []  # what the spare ones lie in: graphs know no more than their addresses


def counter(device: torch.device) -> Tensor:
    """(1,) int32, a zero for the next launch on the current stream.

    Launches of one stream, which follow one another, share theirs. One in a graph, which may run on any stream, has its
    own, out of those that were made before: a zero made while capturing would be one more launch in every replay.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    spare = _spare.setdefault(device, [])
    if torch.cuda.is_current_stream_capturing():
        return spare.pop() if spare else torch.zeros(1, dtype=torch.int32, device=device)
    if len(spare) < SPARE // 2:
        zeros = torch.zeros((SPARE, ALIGNED), dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # they are used on other streams
        _kept.append(zeros)
        spare += zeros[:, :1].unbind()
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _of_stream:
        _of_stream[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _of_stream[key]
