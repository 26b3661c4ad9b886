"""Who takes part: the backends of grok_kernels, the peers and plug-ins; and one of them in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import cases, contestant, ours, peers_cpu, peers_gpu, peers_torch
from .attention import without_softcap
from .contestant import Contestant, register
from .device import device
from .entrant import Local
from .problems import OPS, select


def load(plugins: Sequence[str | Path] = ()) -> None:
    """Fill the registry: ours, the peers, then the contestants of these files. ValueError for a file that fails."""
    if not any(c.ours for c in contestant._contestants[OPS[0]]):
        _add_ours()
        for module in (peers_torch, peers_cpu, peers_gpu):
            module.add()
    contestant.plug_in(plugins)


def _add_ours() -> None:
    for op in OPS:
        for backend, devices in ours.BACKENDS.items():
            one = Contestant(
                name=f"grok_kernels {backend}",
                op=op,
                bind=partial(ours.bind, op, backend),
                ours=True,
                devices=devices,
                missing=partial(ours.missing, op, backend),
                within=partial(ours.within, backend),
                on_request=backend == "reference",  # the definition, and not fast
            )
            register(one)
            if op == "paged_attention" and backend != "reference":
                # the same work as peers without a softcap
                register(without_softcap(one))


@dataclass(frozen=True)
class Task:
    """What another process needs to build the same entrant as this one."""

    problem: str
    small: bool
    contestant: str
    device: str
    plugins: Sequence[str]
    limit: float


def enter(task: Task) -> Local:
    """The entrant of a task, in the process that calls."""
    load(task.plugins)
    op, model = task.problem.split("/")[:2]
    whole = select([f"{op}/{model.removesuffix('-smoke')}/*"])
    problem = next(p for p in ((q.small() if task.small else q) for q in whole) if p.name == task.problem)
    where = device(task.device, task.small, probed=False)
    (c,) = (c for c in contestant.entrants(problem, where.kind, ["*"]) if c.name == task.contestant)
    return Local(c, cases.build(problem, where.name, where.cold), where, task.limit)
