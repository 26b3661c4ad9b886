"""Interleaves memory over the NUMA nodes of the process, so that all memory controllers serve every read."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

SYSFS = Path("/sys/devices/system/node")
MPOL_DEFAULT, MPOL_INTERLEAVE = 0, 3  # linux/mempolicy.h
MBIND, GET_MEMPOLICY = {"x86_64": (237, 239), "aarch64": (235, 236)}.get(platform.machine(), (0, 0))
log = logging.getLogger("grok_kernels")

Call = Callable[..., int]


def parse_list(text: str) -> set[int]:
    """The numbers of a list as the kernel writes it: 0-3,8."""
    parts = [part.split("-") for part in text.strip().split(",") if part]
    return {number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)}


def nodes(cpus: set[int], sysfs: Path = SYSFS) -> set[int]:
    """The nodes that have memory and at least one of these CPUs; none where the system does not say."""
    try:
        found = parse_list((sysfs / "has_memory").read_text())
        return {node for node in found if cpus & parse_list((sysfs / f"node{node}/cpulist").read_text())}
    except (OSError, ValueError):
        return set()


def interleave(address: int, size: int, over: set[int], call: Call) -> bool:
    """Interleave memory that nothing has touched yet, page by page, over these nodes. Whether it was done.

    One node, and a policy that the process was given (`numactl --membind=0 …`), change nothing. address: of a page.
    call: `syscall` of libc, which returns −1 for a failure.
    """
    if len(over) < 2 or not MBIND:
        return False
    policy = ctypes.c_int(-1)
    if call(GET_MEMPOLICY, ctypes.byref(policy), None, 0, None, 0) != 0 or policy.value != MPOL_DEFAULT:
        return False
    words = max(over) // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    for node in over:
        mask[node // 64] |= 1 << node % 64
    # the kernel reads one bit less than it is told
    pointer, bits = ctypes.c_void_p(address), 64 * words + 1
    if call(MBIND, pointer, ctypes.c_size_t(size), MPOL_INTERLEAVE, mask, ctypes.c_ulong(bits), 0) == 0:
        return True
    _refused(os.strerror(ctypes.get_errno()))
    return False


@cache
def _refused(reason: str) -> None:
    log.warning("weights are not interleaved over NUMA nodes: mbind fails (%s)", reason)


def interleave_here(address: int, size: int) -> bool:
    """`interleave` over the nodes that the process's affinity mask reaches."""
    if not MBIND or not hasattr(os, "sched_getaffinity"):
        return False
    over = nodes(os.sched_getaffinity(0))
    return len(over) > 1 and interleave(address, size, over, ctypes.CDLL(None, use_errno=True).syscall)
