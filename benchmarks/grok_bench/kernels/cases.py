"""From a problem to its data, where it fits into memory."""

from __future__ import annotations

from functools import partial
from math import inf

import torch

from . import attention, gemm, moe, ours, rowwise  # noqa: F401 - they register their families
from .case import Case, seed
from .data import forget
from .entrant import Dropped, limited
from .problems import Problem


def build(p: Problem, device: str, cold: int = 0, free: float | None = None, end: float = inf) -> Case:
    """The data of a problem; successive calls take other data until they have gone through `cold` bytes.

    Dropped where `free` bytes do not hold it, or it is not made before `end`, by `time.perf_counter()`.
    """
    forget(p.op)
    need = cold + p.family.footprint(p)
    if free is not None and need > free:
        raise Dropped("missing", f"needs {need / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are available")
    seed(p.name)
    try:
        with limited(inf, end):
            case = p.family.build(p, device, cold)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Dropped("missing", f"does not fit on {device}: {str(error).splitlines()[0]}") from None
    if p.family.modelled:
        case.names = ours.names(p.op)
        case.due, case.watched = partial(ours.due, p.op), partial(ours.watched, p.op)
    return case
