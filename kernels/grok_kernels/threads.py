"""Binds torch's worker threads where the process reaches several NUMA nodes, so that they keep their caches.

On one node nothing is bound, as by default in OpenMP and llama.cpp: the scheduler hardly moves threads there, and a
bound one could not leave a core that another process, or another thread of the server, needs. Over several nodes a
thread that moves loses its caches to the other end of the machine, and vLLM binds there too.

The caller's own thread is never bound: threads that it starts later would inherit that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from .numa import SYSFS, nodes, parse_list

ENV = "GROK_KERNELS_BIND"
OPENMP = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")  # whoever sets one binds otherwise
log = logging.getLogger("grok_kernels")


class Native(Protocol):
    def bind_threads(self, cpus: list[list[int]]) -> None: ...


def wanted(cpus: set[int], environ: Mapping[str, str] = os.environ, sysfs: Path = SYSFS) -> bool:
    """Whether to bind a process that may run on these CPUs: as `GROK_KERNELS_BIND` says, 1 or 0, or else where they
    belong to several nodes and no variable of OpenMP says otherwise. ValueError for another value."""
    said = environ.get(ENV, "")
    if said not in ("", "0", "1"):
        raise ValueError(f"{ENV}={said!r}: expected 1 or 0")
    if said:
        return said == "1"
    return not any(environ.get(name) for name in OPENMP) and len(nodes(cpus, sysfs)) > 1


def places(threads: int, cpus: set[int], sysfs: Path = SYSFS) -> list[list[int]]:
    """The CPUs of each of `threads` threads, among those of the affinity mask; none to leave them alone.

    As many threads as cores, or more: one core after the other, with both of its hardware threads, so that whatever
    else runs can have the idle one. Fewer: each any CPU of its node, since other pools of the process may want the same
    cores; the nodes take turns, each as often as it has cores. More threads than CPUs: none.
    """
    if threads > len(cpus):
        return []
    cores = sorted({tuple(sorted(_siblings(cpu, sysfs) & cpus)) for cpu in cpus})
    if threads >= len(cores):
        return [list(cores[i % len(cores)]) for i in range(threads)]
    of_nodes = [own for node in _all_nodes(sysfs) if (own := _cpus(node, sysfs) & cpus)]
    turns = sorted((turn, i) for i, own in enumerate(of_nodes) for turn in range(sum(core[0] in own for core in cores)))
    return [sorted(of_nodes[i]) for _, i in turns[:threads]]


def _all_nodes(sysfs: Path) -> list[int]:
    """Also those without memory, whose CPUs compute all the same; none where the system does not say."""
    return sorted(int(path.name[4:]) for path in sysfs.glob("node[0-9]*"))


def _siblings(cpu: int, sysfs: Path) -> set[int]:
    """The CPUs of the core of this one, itself among them."""
    try:
        return parse_list((sysfs.parent / f"cpu/cpu{cpu}/topology/thread_siblings_list").read_text()) | {cpu}
    except (OSError, ValueError):
        return {cpu}


def _cpus(node: int, sysfs: Path) -> set[int]:
    return parse_list((sysfs / f"node{node}/cpulist").read_text())


def bind(native: Native) -> bool:
    """Bind the workers of all of torch's pools in this process, where `wanted`. Whether it was done."""
    if not hasattr(os, "sched_getaffinity"):
        return False
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()  # a cgroup's cpuset is in the mask too
    if not wanted(cpus) or not (found := places(threads, cpus)):
        return False
    native.bind_threads(found)
    log.info("%d worker threads are bound to CPUs; %s=0 leaves them alone", threads, ENV)
    return True
