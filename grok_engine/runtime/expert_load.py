"""How many tokens each expert of each layer gets, in all and by request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .plan import Entry
from .request import Answer, Request

Counts = NDArray[np.int64]


def read_routed(routed: list[Tensor]) -> Counts:
    """experts_LTA of a step, on the host, from each layer's (T, A)."""
    return torch.stack(routed).cpu().numpy().astype(np.int64)


class ExpertLoad:
    """total_LE: (token, slot) pairs that each expert of each layer got since the start.

    L is the number of layers. Of one request, each token counts once, however often it was computed: its counts depend
    on nothing else that ran.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.total_LE: Counts = np.zeros((layers, experts), np.int64)
        self._first_L11 = experts * np.arange(layers).reshape(-1, 1, 1)

    def count(
        self, entries: Sequence[Entry], experts_LTA: Counts, owners: Mapping[int, tuple[Request, Answer]]
    ) -> None:
        """Count a step's tokens. owners: the request and the answer of each entry's seq_id, those that have ended
        left out."""
        self.total_LE = self.total_LE + self._tally(experts_LTA)
        end = 0
        for entry in entries:
            end += len(entry.token_ids)
            request, answer = owners.get(entry.seq_id, (None, None))
            if request is None or answer is None or request.expert_load_LE is None:
                continue
            stop = entry.start + len(entry.token_ids)
            if (new := stop - max(answer.counted, entry.start)) > 0:
                request.expert_load_LE += self._tally(experts_LTA[:, end - new : end])
                answer.counted = stop

    def _tally(self, experts_LTA: Counts) -> Counts:
        shape = self.total_LE.shape
        flat = (experts_LTA + self._first_L11).ravel()
        return np.bincount(flat, minlength=shape[0] * shape[1]).astype(np.int64, copy=False).reshape(shape)
