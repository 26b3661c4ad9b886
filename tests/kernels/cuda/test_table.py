"""The table of compiled kernels in kernels/README.md is what nvcc makes of the sources."""

from __future__ import annotations

import pytest

from tests.kernels.cuda import readme_table as cuda_table

TILES = [(2, 128), (1, 192), (1, 128)]  # halves of a tile, and the columns of one
OUTPUTS = {"ToBf16": 2, "ToFp32": 0, "ToGated": 0.5}  # bytes that the copy engine stores for a column of sums
FORMS: dict[str, dict[str, tuple[int, ...]]] = {  # by the type of the weights, the form of a block: tokens of a tile
    "E4m3": {"Gated": (16, 64), "Even": (16, 64)},
    "Int8": {"Gated": (16, 64, 128), "Even": (16, 64), "Tall": (64, 128)},
}
SWAPPED = [(w, form, n) for w, forms in FORMS.items() for form, tokens in forms.items() for n in tokens]
pytestmark = pytest.mark.skipif(bool(cuda_table.missing()), reason=cuda_table.missing() or "all tools are there")


def test_the_readme_has_the_table_and_no_kernel_spills() -> None:
    if f"nvcc {cuda_table.release()}," not in cuda_table.written():
        pytest.skip(f"the table is of another nvcc than {cuda_table.release()}")
    table = cuda_table.table()
    assert table == cuda_table.written(), "run python -m tests.kernels.cuda.readme_table --write"
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    names = [row[0] for row in rows]
    assert any("route_kernel" in name for name in names)
    assert any("group_kernel" in name for name in names)
    for name, _registers, spilled, *counts in rows:
        assert spilled == "0", name
        assert counts[-2:] == ["0", "0"], f"{name} uses local memory"
    counted = {name.strip("`"): tuple(map(int, counts)) for name, _registers, _spilled, *counts in rows}
    for output, stores in OUTPUTS.items():
        for halves, columns in TILES if output != "ToGated" else TILES[:1]:
            name = f"gemm::fp8_kernel<gemm::{output}, {halves}, {columns}>"
            # of each half four products of 32; a load of x and one of each half's weights; what is stored, 128 bytes a
            # row
            stored = int(halves * columns * stores / 128)
            assert counted.pop(name) == (4 * halves, 0, 1 + halves, stored, 0, 0), name
    assert not any("fp8_kernel" in name for name in counted)
    for weight, form, tokens in SWAPPED:
        name = f"gemm::swapped::swapped_kernel<gemm::swapped::{weight}, gemm::swapped::{form}, {tokens}>"
        # of each part of the weights 128 columns, by 32 of e4m3 or 16 of bf16; their load, and those of x, by 128 bytes
        columns, loads = 2 if form == "Even" else 1, 1 if weight == "E4m3" else 2
        products = (8, 0) if weight == "E4m3" else (0, 16)
        assert counted.pop(name) == (*products, 2 + columns * loads, 0, 0, 0), name
    assert not any("swapped_kernel" in name for name in counted)
