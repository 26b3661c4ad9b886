"""The table of compiled kernels in kernels/README.md is what nvcc makes of the sources."""

from __future__ import annotations

import pytest

from benchmarks import cuda_table

pytestmark = pytest.mark.skipif(bool(cuda_table.missing()), reason=cuda_table.missing() or "all tools are there")


def test_the_readme_has_the_table_and_no_kernel_spills() -> None:
    if f"nvcc {cuda_table.release()}," not in cuda_table.written():
        pytest.skip(f"the table is of another nvcc than {cuda_table.release()}")
    table = cuda_table.table()
    assert table == cuda_table.written(), "run python -m benchmarks.cuda_table --write"
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    names = [row[0] for row in rows]
    assert any("route_kernel" in name for name in names)
    assert any("group_kernel" in name for name in names)
    for name, _registers, spilled, *counts in rows:
        assert spilled == "0", name
        assert counts[-2:] == ["0", "0"], f"{name} uses local memory"
