"""Interleaving over NUMA nodes: a described machine, and system calls that are recorded."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from grok_kernels import numa

pytestmark = pytest.mark.skipif(not numa.MBIND, reason="the system calls of this machine are not known")


class Kernel:
    """Answers the two system calls as Linux would, with this policy, and keeps what is bound."""

    def __init__(self, policy: int = numa.MPOL_DEFAULT, fails: bool = False) -> None:
        self.policy, self.fails = policy, fails
        self.bound: list[tuple[int, int, int, list[int], int]] = []

    def __call__(self, number: int, *args: Any) -> int:
        if number == numa.GET_MEMPOLICY:
            args[0]._obj.value = self.policy
            return 0
        assert number == numa.MBIND
        address, size, mode, mask, bits, flags = args
        self.bound.append((address.value, size.value, mode, list(mask), bits.value))
        assert flags == 0
        return -1 if self.fails else 0


def described(root: Path, nodes: dict[int, str], memory: str) -> Path:
    (root / "has_memory").write_text(memory + "\n")
    for node, cpus in nodes.items():
        (root / f"node{node}").mkdir()
        (root / f"node{node}/cpulist").write_text(cpus + "\n")
    return root


def test_lists_are_read() -> None:
    assert numa.parse_list("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert numa.parse_list("\n") == set()


def test_nodes_with_memory_that_the_process_runs_on(tmp_path: Path) -> None:
    root = described(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15", 2: "16-17", 3: ""}, "0-1,3")
    assert numa.nodes(set(range(18)), root) == {0, 1}
    assert numa.nodes({4, 12}, root) == {1}
    assert numa.nodes({16}, root) == set()
    assert numa.nodes({0}, tmp_path / "none") == set()


@pytest.mark.parametrize(("over", "mask"), [({0, 1}, [3]), ({1, 64}, [2, 1])])
def test_memory_is_interleaved(over: set[int], mask: list[int]) -> None:
    kernel = Kernel()
    assert numa.interleave(4096, 8192, over, kernel)
    assert kernel.bound == [(4096, 8192, numa.MPOL_INTERLEAVE, mask, 64 * len(mask) + 1)]


@pytest.mark.parametrize(("over", "policy"), [({0}, 0), (set(), 0), ({0, 1}, 2), ({0, 1}, 3)])
def test_one_node_and_a_given_policy_change_nothing(over: set[int], policy: int) -> None:
    kernel = Kernel(policy)
    assert not numa.interleave(4096, 8192, over, kernel)
    assert not kernel.bound


def test_a_refusal_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    numa._refused.cache_clear()
    kernel = Kernel(fails=True)
    ctypes.set_errno(0)
    assert not numa.interleave(4096, 8192, {0, 1}, kernel)
    assert not numa.interleave(4096, 8192, {0, 1}, kernel)
    assert caplog.text.count("not interleaved over NUMA nodes") == 1


def test_linux_takes_these_arguments() -> None:
    """As if there were two nodes: the kernel leaves out one that the machine lacks."""
    room = ctypes.create_string_buffer(3 * 4096)
    address = -(-ctypes.addressof(room) // 4096) * 4096
    call, policy = ctypes.CDLL(None, use_errno=True).syscall, ctypes.c_int(-1)
    if call(numa.GET_MEMPOLICY, ctypes.byref(policy), None, 0, None, 0) != 0 or policy.value != numa.MPOL_DEFAULT:
        pytest.skip("this process may not ask, or has a policy")
    if not numa.interleave(address, 4096, {0, 1}, call):
        assert ctypes.get_errno() in (errno.EPERM, errno.ENOSYS), os.strerror(ctypes.get_errno())
        pytest.skip("this process may not set policies")
    of_address = 2  # MPOL_F_ADDR
    assert call(numa.GET_MEMPOLICY, ctypes.byref(policy), None, 0, ctypes.c_void_p(address), of_address) == 0
    assert policy.value == numa.MPOL_INTERLEAVE
