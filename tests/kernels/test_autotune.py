"""`python -m grok_kernels.autotune` with a clock and, but for one test, products of the tests' own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grok_engine.models.families import PRESETS
from grok_kernels import autotune as module
from grok_kernels import tuning
from grok_kernels.autotune import FORMATS, MODELS, Bench, Product, candidates, main, products, tune
from grok_kernels.chips import CHIPS, Chip, assume_chip
from grok_kernels.tuning import Gemm, default_gemm, gemm
from tests.kernels.backends import BACKENDS

CPU = torch.device("cpu")
SMALL = Product(256, 128, "fp8", False, 2)


def test_the_models_are_the_engine_s() -> None:
    for name, sizes in MODELS.items():
        c = PRESETS[name]
        assert sizes == (c.d_model, c.num_heads * c.head_dim, c.qkv_dim, c.d_ff, c.dense_d_ff, c.vocab_size)
        assert (c.num_experts, c.num_experts_per_tok) == (module.EXPERTS, module.ACTIVE)
        keys = [p.key for p in products(name, FORMATS)]
        assert len(keys) == len(set(keys))
    assert "32768,6144,e4m3,float8_e4m3fn,pair" in [p.key for p in products("grok-1", ["fp8"])]
    assert "6144,32768,bf16,int8,single" in [p.key for p in products("grok-1", ["int8"])]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_candidates_fit_into_the_chip(chip: Chip, few: bool) -> None:
    for model in MODELS:
        for p in products(model, FORMATS):
            x, w, dot = FORMATS[p.fmt]
            found = candidates(p, chip, few)
            assert found[0] == default_gemm(dot, w, chip, few=few, pair=p.pair)
            assert len(set(found)) == len(found) >= 4
            for tile in found[1:]:
                if tile.group_m != found[0].group_m:
                    continue  # the default in another order
                row_bytes = tile.block_m * x.itemsize + (1 + p.pair) * tile.block_n * w.itemsize
                shared = tile.stages * tile.block_k * row_bytes
                assert shared + module.RESERVED <= chip.shared_bytes
                assert tile.block_m * tile.block_n * (1 + p.pair) / (32 * tile.warps) <= module.REGISTERS
                assert (tile.block_n if tile.swap else tile.block_m) >= 64
                assert tile.block_k * max(x.itemsize, w.itemsize) <= 256
                assert tile.block_n == 128 or not p.pair or dot == "bf16"  # rows are quantised again by that many


class Pretended:
    """Every tile's result is the truth, but for those of `wrong`; its bits are those of its block of K."""

    def __init__(self, wrong: Callable[[Gemm], bool] = lambda tile: False) -> None:
        self.wrong = wrong
        self.ran: list[tuple[Gemm, int]] = []

    def truth(self, rows: int) -> Tensor:
        return torch.ones(rows, 4)

    def with_tiles(self, tile: Gemm, rows: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.ran.append((tile, rows))
            if tile.warps == 4 and tile.block_n == 64:
                raise RuntimeError("out of resource: registers\nmore")
            if self.wrong(tile):
                return torch.full((rows, 4), 2.0)
            return torch.full((rows, 4), 1.0 + tile.block_n * 1e-6)

        return run


def clock(bench: Pretended, cost: Callable[[Gemm, int], float]) -> module.Timer:
    def timer(calls: Sequence[Callable[[], Any]]) -> list[float]:
        seconds = []
        for call in calls:
            call()
            seconds.append(cost(*bench.ran[-1]))
        return seconds

    return timer


def tuned(
    tmp_path: Path, bench: Pretended, cost: Callable[[Gemm, int], float], **options: Any
) -> tuple[Any, list[str]]:
    said: list[str] = []
    file = tmp_path / "tuned" / "h100.json"
    options |= {"say": said.append, "bench": lambda p, d: bench}
    failed = tune([SMALL], CHIPS["h100"], CPU, clock(bench, cost), file, **options)
    return (json.loads(file.read_text())["gemm"][SMALL.key] if not failed else None), said


def test_the_fastest_that_is_right(tmp_path: Path) -> None:
    bench = Pretended(wrong=lambda tile: tile.block_m == 256)

    def cost(tile: Gemm, rows: int) -> float:  # large tiles are the fastest, and wrong; more warps and stages help
        return rows / tile.block_m / tile.warps / tile.stages if rows > 64 else tile.block_m / tile.warps

    entry, said = tuned(tmp_path, bench, cost)
    many, few = Gemm(**entry["many"]), Gemm(**entry["few"])
    assert many.block_m in (64, 128)
    assert many.warps == 8
    assert (few.block_m, few.warps, few.swap) == (16, 8, True)
    assert few.block_n == many.block_n  # only such have the same bits here
    assert entry["same_bits"]
    assert any("wrong by 1.0e+00" in line for line in said)
    assert any("RuntimeError: out of resource: registers" in line and "more" not in line for line in said)


def test_few_and_many_with_other_bits(tmp_path: Path) -> None:
    """The fastest for few rows with other bits is passed over; where none has the same, many serves alone, said so."""
    bench = Pretended()
    cost = lambda tile, rows: tile.block_n + tile.block_m / 100 if tile.swap else 1000 - tile.block_n  # noqa: E731
    entry, said = tuned(tmp_path, bench, cost)
    assert not entry["many"]["swap"] or entry["many"]["block_n"] == 64
    assert entry["same_bits"] == (entry["few"]["block_n"] == entry["many"]["block_n"])
    pretended = bench.with_tiles

    def other(tile: Gemm, rows: int) -> Callable[[], Tensor]:
        run = pretended(tile, rows)
        return lambda: run() + (1e-6 if tile.block_m == 16 else 0)

    bench.with_tiles = other  # type: ignore[method-assign]
    entry, said = tuned(tmp_path, bench, lambda tile, rows: tile.block_m, again=True)
    assert entry["few"]["block_m"] == 32
    bench.with_tiles = lambda tile, rows: lambda: pretended(tile, rows)() + tile.block_m * 1e-6 + tile.warps * 1e-6  # type: ignore[method-assign]
    entry, said = tuned(tmp_path, bench, lambda tile, rows: tile.block_m, again=True)
    if not entry["same_bits"]:
        assert "  many serves all rows" in said


def test_a_variant_for_few_rows_that_gains_nothing_does_not_serve(tmp_path: Path) -> None:
    entry, said = tuned(tmp_path, Pretended(), lambda tile, rows: 2.0 if tile.block_m < 64 else 1.0)
    assert entry["same_bits"] or "  many serves all rows" in said
    few_is_many = all(entry["few"][k] == entry["many"][k] for k in ("block_m", "block_n"))
    assert few_is_many or not entry["same_bits"]


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    bench = Pretended()
    entry, _ = tuned(tmp_path, bench, lambda tile, rows: tile.block_m)
    ran = len(bench.ran)
    again, said = tuned(tmp_path, bench, lambda tile, rows: -tile.block_m)
    assert (again, len(bench.ran)) == (entry, ran)
    assert "  known" in said
    tuned(tmp_path, bench, lambda tile, rows: tile.block_m, again=True)
    assert len(bench.ran) > ran


def test_nothing_that_is_right(tmp_path: Path) -> None:
    entry, said = tuned(tmp_path, Pretended(wrong=lambda tile: True), lambda tile, rows: 1.0)
    assert entry is None
    refusal = "left out: 256,128,e4m3,float8_e4m3fn,single: no candidate for many rows runs and is right on h100"
    assert refusal in said[-1]


def test_each_product_is_written_when_it_is_done(tmp_path: Path) -> None:
    """So that what is interrupted goes on, and the kernels read what is there."""
    other = Product(512, 128, "bf16", True, 2)
    file = tmp_path / "h100.json"

    def interrupted(p: Product, device: torch.device) -> Pretended:
        if p is other:
            raise KeyboardInterrupt
        return bench

    bench = Pretended()
    timer = clock(bench, lambda tile, rows: tile.block_m)
    with pytest.raises(KeyboardInterrupt):
        tune([SMALL, other], CHIPS["h100"], CPU, timer, file, say=lambda line: None, bench=interrupted)
    assert list(json.loads(file.read_text())["gemm"]) == [SMALL.key]
    assert tune([SMALL, other], CHIPS["h100"], CPU, timer, file, say=lambda line: None, bench=lambda p, d: bench) == 0
    assert set(json.loads(file.read_text())["gemm"]) == {SMALL.key, other.key}
    assert not list(tmp_path.glob(".*"))


def test_the_kernels_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, _ = tuned(tmp_path, Pretended(), lambda tile, rows: tile.block_m)
    monkeypatch.setattr(tuning, "_tuned", lambda chip: json.loads((tmp_path / "tuned" / f"{chip}.json").read_text()))
    args = (SMALL.n, SMALL.k, "e4m3", torch.float8_e4m3fn, CHIPS["h100"])
    assert gemm(*args, 8) == Gemm(**entry["few" if entry["same_bits"] else "many"])
    assert gemm(*args, 65) == Gemm(**entry["many"])


def test_a_file_of_another_chip_is_neither_read_nor_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(tmp_path, Pretended(), lambda tile, rows: tile.block_m)
    file = tmp_path / "tuned" / "h100.json"
    assert json.loads(file.read_text())["with"]["chip"] == "h100"
    before, bench = file.read_text(), Pretended()
    with pytest.raises(ValueError, match=r"h100\.json was measured on h100, expected h200"):
        tune([SMALL], CHIPS["h200"], CPU, clock(bench, lambda tile, rows: 1.0), file, bench=lambda p, d: bench)
    assert (file.read_text(), bench.ran) == (before, [])
    file.rename(file.with_name("h200.json"))
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    tuning._tuned.cache_clear()
    try:
        assert tuning._tuned("h100") == {}
        with pytest.raises(ValueError, match=r"h200\.json was measured on h100, expected h200"):
            gemm(SMALL.n, SMALL.k, "e4m3", torch.float8_e4m3fn, CHIPS["h200"], 8)
    finally:
        tuning._tuned.cache_clear()


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels do not run here")
@pytest.mark.parametrize("p", [SMALL, Product(128, 128, "int8", True, 1)], ids=["single", "pair"])
def test_with_the_kernels_themselves(p: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: that the tiles asked for are those that run, and what comes out is right."""
    monkeypatch.setattr(module, "BIT_ROWS", (1, 5))
    monkeypatch.setattr(module, "FEW", (2,))
    monkeypatch.setattr(module, "MANY", (4,))
    monkeypatch.setattr(module, "FEW_ROWS", 4)
    all_of = module.candidates
    count = 1 if p.pair else 2
    monkeypatch.setattr(module, "candidates", lambda *args: all_of(*args)[:count])
    seen: list[dict[str, Any]] = []
    from grok_kernels.triton import gemm as gemm_module
    from grok_kernels.triton import moe as moe_module

    for m in (gemm_module, moe_module):
        monkeypatch.setattr(m, "launch", _spying(m.launch, seen))
    file = tmp_path / "h100.json"
    said: list[str] = []
    with assume_chip(CHIPS["h100"]):
        timer = lambda calls: [float(i + 1) for i, call in enumerate(calls) if call() is not None]  # noqa: E731
        assert tune([p], CHIPS["h100"], CPU, timer, file, say=said.append, bench=lambda p, d: Bench(p, d, 8)) == 0
        tiles = [*all_of(p, CHIPS["h100"], False)[:count], *all_of(p, CHIPS["h100"], True)[:count]]
    entry = json.loads(file.read_text())["gemm"][p.key]
    assert Gemm(**entry["many"]) in tiles[:count], said
    assert Gemm(**entry["few"]) in tiles[count:]
    ran = {(meta["BLOCK_M"], meta["num_stages"], meta["SWAP"]) for meta in seen if "BLOCK_M" in meta}
    assert {(tile.block_m, tile.stages, tile.swap) for tile in tiles} <= ran


def _spying(launch: Callable[..., None], seen: list[dict[str, Any]]) -> Callable[..., None]:
    def spied(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        seen.append(meta)
        launch(kernel, grid, *args, **meta)

    return spied


@pytest.mark.parametrize("same", [True, False])
def test_whether_the_cuda_backend_may_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    """The tiles that are compared, and what is kept of it beside what was there."""
    file, seen = tmp_path / "h100.json", []
    file.write_text('{"gemm": {"a": 1}}')

    def moe(x: Tensor, *args: Any, tile: int) -> Tensor:
        seen.append((args[2].dtype, args[-1], tile))
        return x if same or tile != 64 else x + 1

    monkeypatch.setattr(module.cuda, "moe", moe)
    monkeypatch.setattr(
        module.registry, "backends", lambda: {"moe": {"cuda": SimpleNamespace(reason="there is no GPU")}}
    )
    module.tune_swapped(torch.device("cpu"), file)
    assert (json.loads(file.read_text()), seen) == ({"gemm": {"a": 1}}, [])
    monkeypatch.setattr(module.registry, "backends", lambda: {"moe": {"cuda": SimpleNamespace(reason="")}})
    monkeypatch.setattr(module.cuda, "unusable", lambda: "")
    module.tune_swapped(torch.device("cpu"), file)
    swapped = {"float8_e4m3fn": {"same_bits": same}, "int8": {"same_bits": same}}
    assert json.loads(file.read_text()) == {"gemm": {"a": 1}, "swapped": swapped}
    assert seen[:2] == [(torch.float8_e4m3fn, "fp8", 0), (torch.float8_e4m3fn, "fp8", 16)]
    assert {n for w, _, n in seen if w == torch.int8} == ({16, 64, 128} if same else {16, 64})


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--format", "fp8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(len(line.split()) == 3 for line in lines)
    assert main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err == "autotune: cpu is not a GPU that is here\n"


def test_candidates_are_compiled_before_they_are_measured(tmp_path: Path) -> None:
    """Without a GPU: into a cache from which a process on the chip takes them."""
    code = (
        "from grok_kernels.autotune import Product, _compile, candidates\n"
        "from grok_kernels.chips import CHIPS\n"
        "for pair in (True, False):\n"
        "    p = Product(256, 256, 'fp8', pair, 8)\n"
        "    _compile(p, CHIPS['h100'], candidates(p, CHIPS['h100'], True)[0])\n"
    )
    env = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    compiled = {path.stem for path in tmp_path.glob("*/*.cubin")}
    assert compiled >= {"_gate_up", "_grouped_gemm"}
