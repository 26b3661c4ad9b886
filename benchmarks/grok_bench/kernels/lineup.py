"""Who takes part: the backends of grok_kernels, the peers and plug-ins; and one of them in a process of its own."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from . import cases, contestant, ours, peers_cpu, peers_gpu, peers_kt, peers_torch, trace
from .attention import without_softcap
from .contestant import Contestant, register
from .device import device
from .entrant import Local
from .problems import FAMILIES, select


def load(plugins: Sequence[str | Path] = ()) -> list[str]:
    """Fill the registry: ours, the peers, then those of plug-ins; return the names of those in files.

    A plug-in is a Python file that registers contestants and problems, or a folder in the format of FlashInfer-Trace.
    ValueError for one that fails.
    """
    if not any(c.ours for c in contestant.everyone()):
        for op in dict.fromkeys(family.op for family in FAMILIES if family.modelled):
            _add_ours(op)
        for module in (peers_torch, peers_cpu, peers_kt, peers_gpu):
            module.add()
    mine = list[Contestant]()
    for path in map(Path, plugins):
        before = contestant.everyone()
        try:
            trace.read(path) if path.is_dir() else runpy.run_path(str(path), run_name="grok_bench_plugin")
        except Exception as error:  # whatever it raises
            raise ValueError(f"--plugin {path}: {type(error).__name__}: {error}") from error
        mine += [] if path.is_dir() else [c for c in contestant.everyone() if c not in before]
    return [c.name for c in mine]


def _add_ours(op: str) -> None:
    for backend, devices in ours.BACKENDS.items():
        one = Contestant(
            name=f"grok_kernels {backend}", op=op, bind=partial(ours.bind, op, backend), ours=True, devices=devices,
            missing=partial(ours.missing, op, backend), within=partial(ours.within, backend),
            on_request=backend == "reference",  # the definition, and not fast
        )  # fmt: skip
        register(one)
        if op == "paged_attention" and backend != "reference":
            register(without_softcap(one))  # the same work as peers without a softcap


def enter(problem: str, name: str, where: str, small: bool, plugins: Sequence[str], limit: float) -> Local:
    """The entrant of the contestant `name`, in the process that calls: another than the one that runs the benchmark."""
    load(plugins)
    (chosen,) = select([problem])
    there = device(where, small, probed=False)
    (c,) = (c for c in contestant.entrants(chosen, there.kind, ["*"]) if c.name == name)
    return Local(c, cases.build(chosen, there.name, there.cold), there, limit)
