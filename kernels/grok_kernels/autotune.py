"""The command that measures how this GPU's products are best cut and writes tuned/<chip>.json, which `tuning` reads.

python -m grok_kernels.autotune [--model grok-1 ...] [--format fp8 ...] [--out FILE] [--again] [--swapped] [--list]

For every product of a model, candidates for many rows and for few are checked against the reference and timed in turns,
each call after a write that flushes the L2 cache. "many" is the best over all numbers of rows, since it may have to
serve alone. "few" is the best with the same bits, found by running both; if none has them it is the best of all, and is
not used. The file is written after every product, so that an interrupted run resumes where it stopped. "swapped" says
whether all tiles of the cuda backend's swapped-operand GEMM gave the same bits; without that one tile serves all
(`tuning.swapped_tile`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import cuda, registry
from .chips import Chip, chip_of
from .dtypes import FP8_MAX, dtype_name
from .ops import group_tokens, grouped_gemm, moe, quantize_fp8, quantize_int8
from .tuning import FEW_ROWS, SWAPPED_TILES, Gemm, default_gemm, gemm_key, read_tuned
from .weights import Weight

FORMATS = {  # dtypes of the rows and of the weights, and the type they multiply in
    "fp8": (torch.float8_e4m3fn, torch.float8_e4m3fn, "e4m3"),
    "int8": (torch.bfloat16, torch.int8, "bf16"),
    "bf16": (torch.bfloat16, torch.bfloat16, "bf16"),
    "fp8-weights": (torch.bfloat16, torch.float8_e4m3fn, "bf16"),
    "int8-rows": (torch.int8, torch.int8, "int8"),
}
MODELS = {  # d_model, columns of all heads, columns of q, k and v, width of an expert, of a dense block, vocabulary
    "grok-1": (6144, 6144, 8192, 32768, 0, 131072),
    "grok-2": (8192, 8192, 10240, 16384, 32768, 131072),
    "mixtral-8x7b": (4096, 4096, 6144, 14336, 0, 32000),
    "mixtral-8x22b": (6144, 6144, 8192, 16384, 0, 32000),
}
EXPERTS, ACTIVE, GROUPS = 8, 2, 8
FEW, MANY = (1, 8, 64), (512, 4096)  # numbers of rows that are timed
BIT_ROWS = (1, 2, 7, 8, 16, 33, 64)  # numbers of rows on which the bits of few and many are compared
BOUND = 5e-3  # ‖got − reference‖ / ‖reference‖
ROUNDS = 15
FLUSH = 256 << 20  # bytes, more than any L2 cache
REGISTERS = 160  # of a thread's 255, for accumulators
RESERVED = 16384  # bytes of shared memory for all but the operands


@dataclass(frozen=True)
class Product:
    """(rows, k) x (n, k) for each of `experts`; with `pair`, gate and up at once, n columns each."""

    n: int
    k: int
    fmt: str
    pair: bool
    experts: int
    groups: int = 1  # of int8 weights' scales along K

    @property
    def key(self) -> str:
        _, weight, dot = FORMATS[self.fmt]
        return gemm_key(self.n, self.k, dot, weight, self.pair)


def products(model: str, formats: Iterable[str]) -> list[Product]:
    """All of a model's, each once."""
    d, heads, qkv, f, dense, vocab = MODELS[model]
    found = [Product(vocab, d, "bf16", False, 1)]
    for fmt in formats:
        groups = GROUPS if fmt.startswith("int8") else 1
        found += [Product(qkv, d, fmt, False, 1), Product(d, heads, fmt, False, 1, groups)]
        for width, experts in ((f, EXPERTS), (dense, 1)):
            if width:
                found += [Product(width, d, fmt, True, experts), Product(d, width, fmt, False, experts, groups)]
    return list({p.key: p for p in found}.values())


def candidates(p: Product, chip: Chip, few: bool) -> list[Gemm]:
    """The tiles worth measuring, the default first: those that fit into shared memory and registers."""
    x, w, dot = FORMATS[p.fmt]
    first = default_gemm(dot, w, chip, few=few, pair=p.pair)
    size = {"e4m3": 1, "int8": 1, "bf16": 2}[dot]
    pairs, block_k = 2 if p.pair else 1, 128 // size
    # a partial sum that is promoted needs registers beside those of the sum that it goes to
    promoted = 2 if dot in ("e4m3", "int8") or p.groups > 1 else 1
    # gate and up with 8-bit rows are quantised again by 128 columns, which a tile therefore has
    widths = (128,) if p.pair and dot != "bf16" else (64, 128, 256)
    found = [first]
    for block_m in (16, 32, 64) if few else (64, 128, 256):
        for block_n in widths:
            for swap in (True,) if few else (False, True):
                for warps in (4, 8):
                    mma_m, mma_n = (block_n, block_m) if swap else (block_m, block_n)
                    sums = block_m * block_n * pairs * promoted / (32 * warps)
                    if mma_m < 64 or mma_n > 256 or sums > REGISTERS or sums < 8:
                        continue
                    stage = (block_m * x.itemsize + pairs * block_n * w.itemsize) * block_k
                    most = min(8 if few else 5, (chip.shared_bytes - RESERVED) // stage)
                    in_flight = [n for n in dict.fromkeys((most, most // 2 + 1)) if n >= min(2, most) > 0]
                    found += [Gemm(block_m, block_n, block_k, warps, stages, swap) for stages in in_flight]
    if not few:
        found += [replace(first, group_m=group_m) for group_m in (4, 16)]
    return list(dict.fromkeys(found))


class Bench:
    """A product's weights and rows on the device, and runs of it with given tiles."""

    def __init__(self, p: Product, device: torch.device, most: int = max(MANY)) -> None:
        self.p, self.device = p, device
        torch.manual_seed(0)
        x_dtype, w_dtype, _ = FORMATS[p.fmt]
        self.weights = [self._matrices(2 * p.n if p.pair else p.n, p.k, w_dtype, 1 if p.pair else p.groups)]
        if p.pair:
            self.weights.append(self._matrices(p.k, p.n, w_dtype, 1))
        self.act_format = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}.get(x_dtype, "none")
        self.x = torch.randn(most, p.k, device=device).bfloat16()

    def _matrices(self, n: int, k: int, dtype: torch.dtype, groups: int) -> Weight:
        shape = (self.p.experts, n, k)
        weight = torch.empty(shape, dtype=dtype, device=self.device)
        for matrix in weight:  # one at a time: all experts' would not fit in fp32
            if dtype == torch.int8:
                matrix.random_(-127, 128)
            else:
                size = 64.0 if dtype.itemsize == 1 else k**-0.5
                matrix.copy_((torch.randn(n, k, device=self.device) * size).clamp_(-FP8_MAX, FP8_MAX))
        if dtype.itemsize == 2:
            return Weight.of(weight)
        scale = (torch.rand(self.p.experts, groups, n, device=self.device) + 0.5) / (70 * k**0.5)
        return Weight.of(weight, scale)

    def call(self, rows: int) -> Callable[[], Tensor]:
        op, args = self.arguments(rows)
        functions: dict[str, Callable[..., Tensor]] = {"moe": moe, "grouped_gemm": grouped_gemm}
        return partial(functions[op], *args)

    def arguments(self, rows: int) -> tuple[str, tuple[Any, ...]]:
        """An op and its arguments for so many rows, spread evenly over the experts. A row of gate and up goes through
        the second product too, whose time is the same for all candidates."""
        p, weight = self.p, self.weights[0]
        if p.pair:
            active = min(ACTIVE, p.experts, rows)
            tokens = rows // active
            chosen = torch.arange(tokens * active, device=self.device).view(tokens, active) % p.experts
            topk = torch.full((tokens, active), 0.5, device=self.device)
            args = (self.x[:tokens], topk, chosen.int(), *self.weights)
            return "moe", (*args, "gelu_tanh", self.act_format)
        x, x_scale = self.x[:rows], None
        if self.act_format != "none":
            x, x_scale = (quantize_fp8 if self.act_format == "fp8" else quantize_int8)(x, 128)
        offsets = None
        if p.experts > 1:
            chosen = torch.arange(rows, device=self.device, dtype=torch.int32).view(rows, 1) % p.experts
            _, offsets = group_tokens(chosen, p.experts)
        return "grouped_gemm", (x, weight, offsets, x_scale, torch.bfloat16)

    def with_tiles(self, tile: Gemm, rows: int) -> Callable[[], Tensor]:
        call = self.call(rows)

        def run() -> Tensor:
            with registry.use_backend("triton"), forced(self.p, tile):
                return call()

        return run

    def truth(self, rows: int) -> Tensor:
        with registry.use_backend("reference"):
            return self.call(rows)()


@contextmanager
def forced(p: Product, tile: Gemm) -> Iterator[None]:
    """Inside the block this product is cut into these tiles; all others as ever."""
    module: Any = import_module("grok_kernels.triton.gemm")
    select = module.gemm

    def chosen(n: int, k: int, dot: str, weight: torch.dtype, *rest: Any, pair: bool = False) -> Gemm:
        mine = gemm_key(n, k, dot, weight, pair) == p.key
        return tile if mine else select(n, k, dot, weight, *rest, pair=pair)

    module.gemm = chosen
    try:
        yield
    finally:
        module.gemm = select


def compile_ahead(p: Product, chip: Chip, pool: Executor) -> None:
    """Compile all candidates into Triton's cache in parallel: one after another they take two seconds each."""
    tiles = [tile for few in (False, True) for tile in candidates(p, chip, few)]
    list(pool.map(partial(_compile, p, chip), tiles))


def _compile(p: Product, chip: Chip, tile: Gemm) -> None:
    """In a process of its own, with tensors that need no memory. A candidate that does not compile fails again, and is
    reported, when it is run."""
    from .triton import cross_compile, table

    bench = Bench(p, torch.device("meta"), FEW_ROWS)
    op, args = bench.arguments(FEW_ROWS)
    with forced(p, tile):
        found = cross_compile.launches(lambda: getattr(table, op)(*args), chip)
    for launch in found:
        with suppress(Exception):
            cross_compile.compile_launch(launch, chip)


Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]  # the seconds of each call, timed in turns


class CudaTimer:
    """Medians over `ROUNDS` turns of graph replays, since launching a small product takes longer than the product. The
    L2 cache is flushed before each."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH, dtype=torch.int8, device=device)

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        taken: list[list[float]] = [[] for _ in calls]
        calls = [self._captured(call) for call in calls]
        for round_ in range(ROUNDS):
            for j in range(len(calls)):
                i = (round_ + j) % len(calls)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                start.record()
                calls[i]()
                end.record()
                end.synchronize()
                taken[i].append(start.elapsed_time(end) * 1e-3)
        return [median(times) for times in taken]

    @staticmethod
    def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        call()  # allocations and compiles of a first call must not be in the graph
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def error(got: Tensor, expected: Tensor) -> float:
    a, b = got.float(), expected.float()
    found = float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
    return found if math.isfinite(found) else math.inf


def right(bench: Any, tiles: Iterable[Gemm], rows: int, bound: float, say: Callable[[str], None]) -> list[Gemm]:
    """The tiles that run and give what the reference gives; `say` reports the others."""
    expected, found = bench.truth(rows), []
    for tile in tiles:
        try:
            off = error(bench.with_tiles(tile, rows)(), expected)
        except Exception as failure:  # what the compiler, the driver or the chip refuses
            say(f"    {_shown(tile)}: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:90]}")
            continue
        if off <= bound:
            found.append(tile)
        else:
            say(f"    {_shown(tile)}: wrong by {off:.1e}, more than {bound:.1e}")
    return found


def tune_product(p: Product, chip: Chip, bench: Any, timer: Timer, say: Callable[[str], None]) -> dict[str, Any]:
    """The entry of one product. ValueError where no candidate is right."""
    # rows that are quantised again inside may round to the next step of e4m3
    bound = 4 * BOUND if p.pair and FORMATS[p.fmt][2] == "e4m3" else BOUND
    found = {}
    for name, few in (("many", False), ("few", True)):
        found[name] = right(bench, candidates(p, chip, few), FEW_ROWS, bound, say)
        if not found[name]:
            raise ValueError(f"{p.key}: no candidate for {name} rows runs and is right on {chip.name}")
    timed = {"many": FEW + MANY, "few": FEW}
    times = {
        name: {rows: timer([bench.with_tiles(tile, rows) for tile in tiles]) for rows in timed[name]}
        for name, tiles in found.items()
    }
    order = {name: _ranked(tiles, times[name]) for name, tiles in found.items()}
    many = order["many"][0]
    alike = next((tile for tile in order["few"] if same_bits(bench, tile, many)), None)
    same = alike is not None and faster(alike, many, found, times)
    best = {"many": many, "few": alike or order["few"][0]}
    for name, tile in best.items():
        at = found[name].index(tile)
        shown = ", ".join(f"{rows} rows {seconds[at] * 1e6:.1f} µs" for rows, seconds in times[name].items())
        say(f"  {name}: {_shown(tile)}: {shown}")
    say("  few rows and many have the same bits" if same else "  many serves all rows")
    return {**{name: asdict(tile) for name, tile in best.items()}, "same_bits": same}


def _ranked(tiles: Sequence[Gemm], times: dict[int, list[float]]) -> list[Gemm]:
    """The best first, by the product of the times, so that 10% counts the same at any number of rows."""
    score = [math.prod(seconds[i] / min(seconds) for seconds in times.values()) for i in range(len(tiles))]
    return [tiles[i] for i in sorted(range(len(tiles)), key=lambda i: score[i])]


def faster(few: Gemm, many: Gemm, found: dict[str, list[Gemm]], times: dict[str, dict[int, list[float]]]) -> bool:
    """Whether the tile for few rows is faster where it would serve."""
    a, b = found["few"].index(few), found["many"].index(many)
    return math.prod(times["few"][rows][a] / times["many"][rows][b] for rows in FEW) < 1


def same_bits(bench: Any, few: Gemm, many: Gemm) -> bool:
    return all(
        torch.equal(bench.with_tiles(few, rows)().view(torch.uint8), bench.with_tiles(many, rows)().view(torch.uint8))
        for rows in BIT_ROWS
    )


def tune(
    wanted: Sequence[Product],
    chip: Chip,
    device: torch.device,
    timer: Timer,
    file: Path,
    *,
    again: bool = False,
    say: Callable[[str], None] = print,
    bench: Callable[[Product, torch.device], Any] = Bench,
    pool: Executor | None = None,
) -> int:
    """Measure the products that the file lacks, or all of them with `again`. Returns how many could not be measured.

    The processes of `pool`, if given, compile a product's candidates first.
    """
    kept = read_tuned(file, chip.name)
    entries, failed = kept.setdefault("gemm", {}), 0
    kept["with"] = _versions(chip)
    for i, p in enumerate(wanted):
        say(f"[{i + 1}/{len(wanted)}] {p.key}")
        if p.key in entries and not again:
            say("  known")
            continue
        if pool is not None:
            compile_ahead(p, chip, pool)
        try:
            entries[p.key] = tune_product(p, chip, bench(p, device), timer, say)
        except (ValueError, torch.OutOfMemoryError) as failure:
            say(f"  left out: {(str(failure).splitlines() or [''])[0]}")
            failed += 1
            continue
        _write(file, kept)
    return failed


def same_swapped_bits(weight: torch.dtype, device: torch.device) -> bool:
    """Whether the cuda backend's expert layer gives the same bits with each of its swapped-operand tiles and, for e4m3,
    with the normal kernel.

    Its experts get few rows and many, and the magnitudes of x differ so much that the tensor core has to truncate.
    """
    t, d, f = 600, 1024, 512
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x = (normal(t, d) * (2 * normal(t, d)).exp()).bfloat16()
    experts = (normal(t, EXPERTS) + torch.arange(EXPERTS, device=device)).topk(ACTIVE).indices.int()
    w13, w2 = ((40 * normal(EXPERTS, *shape)).clamp(-127, 127).to(weight) for shape in ((2 * f, d), (d, f)))
    scales = [normal(EXPERTS, 1, w.shape[1]).abs() / (40 * w.shape[2] ** 0.5) for w in (w13, w2)]
    act_format = "none" if weight == torch.int8 else "fp8"
    weights = [Weight.of(w, scale) for w, scale in zip((w13, w2), scales, strict=True)]
    args: tuple[Any, ...] = (x, normal(t, ACTIVE).abs(), experts, *weights, "gelu_tanh", act_format)
    first, *others = (() if weight == torch.int8 else (0,)) + SWAPPED_TILES[weight]
    expected = cuda.moe(*args, tile=first)
    return all(torch.equal(cuda.moe(*args, tile=tile), expected) for tile in others)


def tune_swapped(device: torch.device, file: Path, *, say: Callable[[str], None] = print) -> None:
    """Write down whether the cuda backend may choose among its tiles, where it serves this chip."""
    if reason := registry.backends()["moe"]["cuda"].reason or cuda.unusable():
        say(f"swapped: left out: {reason}")
        return
    kept = read_tuned(file, chip_of(device).name)
    for weight in SWAPPED_TILES:
        name, same = dtype_name(weight), same_swapped_bits(weight, device)
        kept.setdefault("swapped", {})[name] = {"same_bits": same}
        say(f"swapped: {name}: {'all tiles have the same bits' if same else 'tiles differ, one serves all rows'}")
    _write(file, kept)


def _versions(chip: Chip) -> dict[str, Any]:
    return {"torch": torch.__version__, "triton": version("triton"), "arch": chip.arch, "chip": chip.name}


def _write(file: Path, kept: dict[str, Any]) -> None:
    """Atomically: an interrupted write leaves the old file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(file)


def _shown(tile: Gemm) -> str:
    size = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    swapped = ", swapped" if tile.swap else ""
    return f"{size}, {tile.warps} warps, {tile.stages} stages{swapped}, {tile.group_m} in turn"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m grok_kernels.autotune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="whose products; grok-1 if not given")
    parser.add_argument("--format", action="append", choices=FORMATS, help="of weights and rows; all if not given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="in place of the package's tuned/<chip>.json")
    parser.add_argument("--again", action="store_true", help="measure what the file has, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--swapped", action="store_true", help="only compare the bits of the cuda backend's tiles")
    parser.add_argument("--list", action="store_true", help="print the products and how many candidates each has")
    a = parser.parse_args(argv)
    wanted = [p for model in a.model or ["grok-1"] for p in products(model, a.format or list(FORMATS))]
    wanted = list({p.key: p for p in wanted}.values())
    device = torch.device(a.device)
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if a.list:
        chip = chip_of(device if on_gpu else torch.device("cpu"))
        for p in wanted:
            print(p.key, len(candidates(p, chip, False)), len(candidates(p, chip, True)))
        return 0
    if not on_gpu:
        print(f"autotune: {a.device} is not a GPU that is here", file=sys.stderr)
        return 2
    chip = chip_of(device)
    file = a.out or Path(__file__).parent / "tuned" / f"{chip.name}.json"
    wanted = [] if a.swapped else wanted
    try:
        read_tuned(file, chip.name)
    except ValueError as error:
        print(f"autotune: {error}", file=sys.stderr)
        return 2
    with torch.inference_mode(), ProcessPoolExecutor(max(a.jobs, 1), get_context("spawn")) as pool:
        failed = tune(wanted, chip, device, CudaTimer(device), file, again=a.again, pool=pool)
        tune_swapped(device, file)
    if wanted:
        print(f"{file}: {len(wanted) - failed} of {len(wanted)} products")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
