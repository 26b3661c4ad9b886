"""Binding worker threads: described machines, and the real threads of a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grok_kernels import threads

CPUS = set(range(8))


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    """Two nodes of two cores each, whose second hardware threads are CPUs 4 to 7: 0 1 4 5 | 2 3 6 7."""
    sysfs = tmp_path / "node"
    for node, cpus in {0: "0-1,4-5", 1: "2-3,6-7"}.items():
        (sysfs / f"node{node}").mkdir(parents=True)
        (sysfs / f"node{node}/cpulist").write_text(cpus + "\n")
    (sysfs / "has_memory").write_text("0-1\n")
    for cpu in CPUS:
        (tmp_path / f"cpu/cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{cpu}/topology/thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    return sysfs


def test_a_thread_for_each_core_has_the_core(two_nodes: Path) -> None:
    assert threads.places(4, CPUS, two_nodes) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert threads.places(6, CPUS, two_nodes)[4:] == [
        [0, 4],
        [1, 5],
    ]  # second hardware threads once the cores are taken


def test_fewer_threads_than_cores_take_turns_over_the_nodes(two_nodes: Path) -> None:
    assert threads.places(3, CPUS, two_nodes) == [[0, 1, 4, 5], [2, 3, 6, 7], [0, 1, 4, 5]]


def test_a_node_takes_as_many_threads_as_it_has_cores(two_nodes: Path) -> None:
    assert threads.places(2, {0, 2, 3, 6}, two_nodes) == [[0], [2, 3, 6]]
    more = two_nodes.parent / "cpu/cpu8/topology"  # a third core of node 1
    more.mkdir(parents=True)
    (two_nodes / "node1/cpulist").write_text("2-3,6-8\n")
    assert threads.places(3, {0, 2, 3, 8}, two_nodes) == [[0], [2, 3, 8], [2, 3, 8]]


def test_the_cores_of_a_node_without_memory_compute_too(two_nodes: Path) -> None:
    (two_nodes / "node2").mkdir()
    (two_nodes / "node2/cpulist").write_text("8-11\n")
    assert threads.places(4, {*CPUS, 8, 9}, two_nodes) == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9], [0, 1, 4, 5]]


def test_the_affinity_mask_is_respected(two_nodes: Path) -> None:
    assert threads.places(3, {0, 2, 3, 6}, two_nodes) == [[0], [2, 6], [3]]
    assert threads.places(5, {0, 2, 3, 6}, two_nodes) == []  # more threads than CPUs


def test_a_machine_that_does_not_say_has_a_core_for_each_cpu(tmp_path: Path) -> None:
    assert threads.places(2, {3, 5}, tmp_path / "node") == [[3], [5]]
    assert threads.places(1, {3, 5}, tmp_path / "node") == []  # and no nodes


def test_only_a_process_over_several_nodes_is_bound_by_default(two_nodes: Path) -> None:
    assert threads.wanted(CPUS, {}, two_nodes)
    assert not threads.wanted({0, 1, 4, 5}, {}, two_nodes)
    assert not threads.wanted(CPUS, {"OMP_PROC_BIND": "close"}, two_nodes)
    assert not threads.wanted(CPUS, {threads.ENV: "0"}, two_nodes)
    assert threads.wanted({0}, {threads.ENV: "1", "OMP_PROC_BIND": "close"}, two_nodes)
    with pytest.raises(ValueError, match="GROK_KERNELS_BIND='yes': expected 1 or 0"):
        threads.wanted(CPUS, {threads.ENV: "yes"}, two_nodes)


WORKERS = """
import os, threading, torch
from grok_kernels import _C
cpus = sorted(os.sched_getaffinity(0))
torch.set_num_threads(3)
_C.parallel_threads(3)
_C.bind_threads([[cpus[0]], [cpus[0]], [cpus[-1]]])
_C.parallel_threads(3)
found = sorted(sorted(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task"))
assert [cpus[0]] in found and [cpus[-1]] in found, found
assert sum(len(f) == 1 for f in found) == 2 or len(cpus) == 1, found
assert sorted(os.sched_getaffinity(0)) == cpus  # the caller's own thread, and what it starts
started = []
thread = threading.Thread(target=lambda: started.append(sorted(os.sched_getaffinity(0))))
thread.start(); thread.join()
assert started == [cpus], started
for bad in ([], [[]], [[-1]], [[1 << 20]]):
    try:
        _C.bind_threads(bad)
    except ValueError:
        continue
    raise AssertionError(bad)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are bound on Linux alone")
def test_workers_are_bound_and_the_callers_thread_is_not() -> None:
    pytest.importorskip("grok_kernels._C")
    done = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_engine_binds_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Native:
        def bind_threads(self, cpus: list[list[int]]) -> None:
            bound.append(cpus)

    bound: list[list[list[int]]] = []
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 4)
    monkeypatch.setenv(threads.ENV, "0")
    assert not threads.bind(Native())
    monkeypatch.setenv(threads.ENV, "1")
    assert threads.bind(Native())
    assert [len(cpus) for cpus in bound] == [4]
