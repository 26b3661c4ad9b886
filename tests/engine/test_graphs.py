"""Captured decode steps: a CPU's recordings, and in place of CUDA graphs a stand-in that reruns the step on the same
tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grok_kernels
from grok_engine import LLMEngine
from grok_engine.batch import ALIGNED, Batch
from grok_engine.config import ActFormat, EngineConfig, ModelConfig
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.weight import FusedWeight, NamedTensor, holders
from grok_engine.loading.fill import fill
from grok_engine.loading.random import random_checkpoint
from grok_engine.models.decoder import Decoder
from grok_engine.models.families import PRESETS
from grok_engine.runtime.flatten import flatten, take_rows
from grok_engine.runtime.graphs import Capture, CpuCapture, CudaCapture, DecodeGraphs, Run, rungs, widths
from grok_engine.runtime.pages import allocate_pages
from grok_engine.runtime.plan import Entry
from grok_engine.runtime.runner import GPU_SHARE
from grok_kernels import Spec, registry
from tests.engine.test_invariance import SHAPES, SMALL, assert_as_alone, make_engine, make_traffic


class Counted:
    """Counts what is captured and replayed."""

    def __init__(self, capture: Capture) -> None:
        self.capture, self.captured, self.replayed = capture, 0, 0
        self.shapes, self.key = capture.shapes, capture.key

    def __call__(self, run: Run) -> Run:
        captured = self.capture(run)
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            return captured()

        return replay


class StandIn:
    """Like a CUDA graph: a replay reads the same inputs and overwrites the same result tensor."""

    def __init__(self) -> None:
        self.now: Hashable | None = "here"

    def shapes(self, most: int, longest: int, page_size: int) -> tuple[Sequence[int], Sequence[int]]:
        return rungs(most), widths(longest, page_size)

    def key(self) -> Hashable | None:
        return self.now

    def __call__(self, run: Run) -> Run:
        run()
        result = torch.full_like(run(), float("nan"))
        return lambda: result.copy_(run())


CAPTURES: dict[str, Callable[[], Capture]] = {"stand-in": StandIn, "cpu": CpuCapture}


def with_graphs(engine: LLMEngine, kind: str = "stand-in") -> Counted:
    runner, capture = engine.runner, Counted(CAPTURES[kind]())
    runner.graphs = DecodeGraphs(runner.model, runner.cache, runner.config, capture)
    return capture


def test_rungs() -> None:
    assert rungs(1) == (1,)
    assert rungs(3) == (1, 2, 3)
    assert rungs(8) == (1, 2, 4, 8)
    assert rungs(12) == (1, 2, 4, 8, 12)
    assert rungs(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    for most in range(1, 100):
        found = rungs(most)
        assert list(found) == sorted(set(found))
        assert found[-1] == most


def test_widths() -> None:
    assert widths(8192, 16) == (64, 128, 256, 512)
    assert widths(8192, 64) == (16, 32, 64, 128)
    assert widths(1000, 16) == (63,)
    assert widths(1025, 1) == (1024, 1025)
    assert widths(5000, 2048) == (1, 2, 3)
    for longest in range(1, 4000, 7):
        for page in (1, 3, 16, 4096):
            found = widths(longest, page)
            assert found[-1] * page >= longest > (found[-1] - 1) * page
            assert all(0 < a < b <= 2 * a for a, b in pairwise(found))


def test_flatten_pads_with_the_shortest_row_written_nowhere() -> None:
    work = [Entry([7], 5, [3, 9]), Entry([8], 1, [4]), Entry([6], 1, [2])]
    numbers, sizes = flatten(work, 4, rows=6, width=3)
    batch = Batch.of(numbers, sizes, 1)
    assert batch.tokens_T.tolist() == [7, 8, 6, 8, 8, 8]
    assert batch.positions_T.tolist() == [5, 1, 1, 1, 1, 1]
    assert batch.slots_T.tolist() == [37, 17, 9, -1, -1, -1]
    assert batch.seq_lens_B.tolist() == [6, 2, 2, 2, 2, 2]
    assert batch.query_start.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.block_table_BN.tolist() == [[3, 9, 0], [4, 0, 0], [2, 0, 0], *[[4, 0, 0]] * 3]
    for part in (batch.positions_T, batch.slots_T, batch.query_start, batch.seq_lens_B, batch.block_table_BN):
        assert part.storage_offset() % ALIGNED == 0
    plain = Batch.of(*flatten([Entry([7, 1, 2], 5, [3, 9]), Entry([8], 0, [4])], 4), 3)
    assert plain.tokens_T.tolist() == [7, 1, 2, 8]
    assert plain.slots_T.tolist() == [37, 38, 39, 16]
    assert plain.query_start.tolist() == [0, 3, 4]
    assert plain.block_table_BN.tolist() == [[3, 9], [4, 0]]


@pytest.mark.parametrize("lengths", [[8000, 500, 500, 500, 500], [500] * 8 + [8000], [8000, *[500] * 8], [300]])
def test_padding_reads_no_more_than_the_shortest(lengths: list[int]) -> None:
    work = [Entry([5], n - 1, range(-(-n // 16))) for n in lengths]
    rows = next(n for n in rungs(64) if n >= len(lengths))
    padded = Batch.of(*flatten(work, 16, rows=rows), 1).seq_lens_B.tolist()
    assert padded == lengths + [min(lengths)] * (rows - len(lengths))


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", "float32"), ("bfloat16", "fp8_e4m3")])
@pytest.mark.parametrize("shape", ["few pages", "page of 1", "one at a time"])
@pytest.mark.parametrize("kind", CAPTURES)
def test_the_same_bits_as_without(kind: str, shape: str, dtype: str, kv_dtype: str) -> None:
    engine = make_engine(SMALL, dtype, kv_dtype, **SHAPES[shape])
    capture = with_graphs(engine, kind)
    assert_as_alone(engine, make_traffic(11, 1024, requests=12))
    most = math.prod(map(len, capture.shapes(engine.config.max_num_seqs, engine.config.max_len, 1)))
    assert 0 < capture.captured <= most
    assert capture.replayed > 2 * capture.captured


def test_padding_reads_and_writes_no_page() -> None:
    """The result equals a step without padding, and pages that are not in use stay NaN."""
    engine = make_engine(SMALL, "float32", "float32", max_num_seqs=16, page_size=4, num_pages=12)
    runner, nan = engine.runner, float("nan")
    for pages in runner.cache:
        pages.k.fill_(nan)
        pages.v.fill_(nan)
    prompts = [Entry([5, 6, 7, 8, 9], 0, [7, 2]), Entry([3, 4], 0, [5]), Entry([9] * 6, 0, [1, 8])]
    steps = [Entry([11], 5, [7, 2]), Entry([12], 2, [5]), Entry([13], 6, [1, 8])]
    runner.run(prompts)
    before = [(p.k.clone(), p.v.clone()) for p in runner.cache]
    expected = runner.run(steps).clone()
    after = [(p.k.clone(), p.v.clone()) for p in runner.cache]
    for pages, (k, v) in zip(runner.cache, before, strict=True):
        pages.k.copy_(k)
        pages.v.copy_(v)
    capture = with_graphs(engine)
    for _ in range(2):
        found = runner.run(steps)
        assert found.shape == (3, engine.config.model.d_model)
        assert torch.isfinite(found).all()
        assert torch.equal(found, expected)
    assert (capture.captured, capture.replayed) == (1, 2)
    for pages, (k, v) in zip(runner.cache, after, strict=True):
        torch.testing.assert_close(pages.k, k, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(pages.v, v, rtol=0, atol=0, equal_nan=True)


def test_which_steps_have_graphs() -> None:
    engine = make_engine(SMALL, "float32", "float32", max_num_seqs=4, max_model_len=64, page_size=4, num_pages=40)
    capture, graphs = with_graphs(engine), engine.runner.graphs
    assert graphs is not None
    stand_in = capture.capture
    assert isinstance(stand_in, StandIn)
    one = Entry([5], 0, [0])
    with torch.inference_mode():
        assert graphs.run([Entry([5, 6], 0, [0])]) is None
        assert graphs.run([one, Entry([5, 6], 0, [1])]) is None
        assert graphs.run([one] * 5) is None
        assert graphs.run([Entry([5], 0, range(17))]) is None
        assert capture.captured == 0
        for n, captured in ((1, 1), (1, 1), (2, 2), (3, 3), (4, 3), (3, 3)):
            found = graphs.run([Entry([5 + i], 0, [i]) for i in range(n)])
            assert found is not None
            assert len(found) == n
            assert capture.captured == captured
        stand_in.now = "elsewhere"
        assert graphs.run([one]) is not None
        assert capture.captured == 4
        stand_in.now = None
        assert graphs.run([one]) is None


def scale(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter * 2, requires_grad=False)


def replace_norm(model: Decoder) -> None:
    model.final_norm.weight = scale(model.final_norm.weight)


def replace_weight(model: Decoder) -> None:
    weight = model.layers[0].attn.qkv.weight
    values, scales = weight.planes
    model.layers[0].attn.qkv.hold(grok_kernels.Weight.of(values, scales * 2, weight.layout))


def replace_memory(model: Decoder) -> None:
    model.final_norm.weight.data = model.final_norm.weight * 2


def replace_module(model: Decoder) -> None:
    norm = copy.deepcopy(model.final_norm)
    norm.weight = scale(norm.weight)
    model.final_norm = norm


def replace_buffer(model: Decoder) -> None:
    model.cos_sin = model.cos_sin.flip(0).contiguous()


@pytest.mark.parametrize("kind", CAPTURES)
@pytest.mark.parametrize("change", [replace_norm, replace_weight, replace_memory, replace_module, replace_buffer])
def test_a_weight_that_is_replaced_drops_the_graphs(change: Callable[[Decoder], None], kind: str) -> None:
    engine = make_engine(SMALL, "float32", "float32", max_num_seqs=4, max_model_len=64, page_size=4, num_pages=40)
    capture, runner = with_graphs(engine, kind), engine.runner
    work = [Entry([5], 3, [0])]
    for pages in runner.cache:
        pages.k.fill_(0.5)
        pages.v.fill_(0.5)
    before = runner.run(work).clone()
    change(runner.model)
    after = runner.run(work).clone()
    with torch.inference_mode():
        expected = runner.model(Batch.of(*flatten(work, 4), 1), runner.cache)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    assert capture.captured == 2
    assert torch.equal(runner.run(work), expected)
    assert capture.captured == 2


def test_the_backends_that_a_graph_holds() -> None:
    with grok_kernels.use_backend("reference"):
        assert grok_kernels.capturable("cuda") is None
    assert grok_kernels.capturable("meta") is None  # only the reference is there
    with grok_kernels.use_backend("triton"):
        interpreted = grok_kernels.capturable("cuda")
    assert interpreted is not None
    assert "triton" in interpreted


def test_a_backend_that_comes_or_goes_is_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {key: kernel for key, kernel in registry._kernels.items() if key != ("rms_norm", "cuda")}
    monkeypatch.setattr(registry, "_kernels", others)
    monkeypatch.setattr(registry, "_missing", {})
    registry._forget()
    before = grok_kernels.capturable("cuda")
    assert before is not None
    registry.register("rms_norm", "cuda")(lambda *args: None)
    assert grok_kernels.capturable("cuda") != before
    registry.mark_missing("cuda", "gone")
    registry.mark_missing("triton", "gone")
    assert grok_kernels.capturable("cuda") is None
    monkeypatch.undo()
    registry._forget()


def test_memory_of_all_graphs() -> None:
    """The largest takes the shared memory, the second what each further one takes; there are 5 rungs and 2 widths."""
    engine = make_engine(SMALL, "float32", "float32", max_num_seqs=16, page_size=1, num_pages=40, max_model_len=128)
    runner, capture = engine.runner, Counted(stand_in := StandIn())
    config = replace(engine.config, model=replace(engine.config.model, max_position=2048), max_model_len=2048)
    with torch.inference_mode():
        free = iter([1000, 700, 690])
        graphs = DecodeGraphs(runner.model, runner.cache, config, capture)
        assert graphs.bytes_needed(lambda: next(free)) == 300 + 10 * 9
        assert capture.captured == 2
        free = iter([1000, 1100, 1090])
        assert DecodeGraphs(runner.model, runner.cache, config, capture).bytes_needed(lambda: next(free)) == 10 * 9
        free = iter([1000, 900])
        config = replace(config, max_num_seqs=1, max_model_len=128)
        assert DecodeGraphs(runner.model, runner.cache, config, capture).bytes_needed(lambda: next(free)) == 100
        stand_in.now = None
        assert DecodeGraphs(runner.model, runner.cache, config, capture).bytes_needed(lambda: 0) == 0


@pytest.mark.parametrize("name", ["grok-1", "grok-2", "mixtral-8x7b", "mistral-7b"])
def test_no_step_asks_for_a_value(name: str) -> None:
    """`meta` tensors have no values, so reading one would raise. So nothing in a step waits for the device."""
    config = small(PRESETS[name])
    model = Decoder(config, torch.bfloat16, "meta", 64)
    for module in model.modules():
        if isinstance(module, FusedWeight):
            module.allocate(Spec("bf16") if isinstance(module, Embedding) else Spec("int8", 1), "meta")
        elif isinstance(module, NamedTensor):
            module.allocate("meta")
    numbers, sizes = flatten([Entry([5], 3, [1]), Entry([6], 9, [0])], 16, rows=4, width=4)
    with torch.inference_mode():
        x_TD = model(Batch.of(numbers.to("meta"), sizes, 1), allocate_pages(config, 4, 16, torch.bfloat16, "meta"))
        assert model.logits(x_TD).shape == (4, config.vocab_size)


def small(config: ModelConfig) -> ModelConfig:
    return replace(
        config, vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, attn_scale=0.3,
        d_ff=config.d_ff and 16, dense_d_ff=config.dense_d_ff and 24, max_position=256,
    )  # fmt: skip


@pytest.mark.skipif(not grok_kernels.backends()["moe"]["cpu"].available, reason="not built")
@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("name", ["grok-1", "grok-2", "mixtral-8x7b", "mistral-7b"])
def test_a_recording_runs_no_python_between_layers(name: str, activations: ActFormat) -> None:
    """Of a model in one format, and of one whose values have another format than queries and keys."""
    counts = set()
    for layers, mixed in ((1, False), (3, False), (3, True)):
        config = replace(small(PRESETS[name]), num_layers=layers, d_model=64, num_heads=8)
        model = Decoder(config, torch.bfloat16, activations=activations)
        for layer in model.layers if mixed else ():
            layer.attn.qkv.divide([2, 1])
        formats = {"0": Spec("int8", 1)}
        for path, module in holders(model):
            module.allocate(*() if isinstance(module, NamedTensor) else (formats.get(path[-1], Spec("bf16")),), "cpu")
        cache = allocate_pages(config, 4, 16, torch.bfloat16, "cpu")
        numbers, sizes = flatten([Entry([5], 3, [1])], 16)
        with torch.inference_mode():
            batch = Batch.of(numbers, sizes, 1)
            model(batch, cache)  # what is made once
            run = CpuCapture()(partial(model, batch, cache))
        counts.add(len(run._steps))
    assert len(counts) == 1, counts


@pytest.mark.parametrize("kind", CAPTURES)
@pytest.mark.parametrize("name", ["grok-2", "mistral-7b"])
def test_families_with_dense_layers(name: str, kind: str) -> None:
    """Their layers allocate tensors in every step."""
    model = Decoder(small(PRESETS[name]), torch.float32)
    fill(model, random_checkpoint(model, "fp32"))
    config = EngineConfig(model=model.config, dtype="float32", num_pages=4, max_num_seqs=4)
    cache = allocate_pages(model.config, 4, 16, torch.float32, "cpu")
    for pages in cache:
        pages.k.zero_()
        pages.v.zero_()
    graphs = DecodeGraphs(model, cache, config, CAPTURES[kind]())
    for tokens in ((5, 6, 7), (8, 9, 10)):
        work = [Entry([tokens[0]], 3, [1]), Entry([tokens[1]], 9, [0]), Entry([tokens[2]], 0, [2])]
        with torch.inference_mode():
            expected = model(Batch.of(*flatten(work, 16), 1), cache).clone()
            found = graphs.run(work)
        assert found is not None
        assert torch.equal(found, expected)


def test_rows_are_taken_as_by_an_index() -> None:
    x = torch.randn(5, 3)
    assert torch.equal(take_rows(x, [4, 0, 0]), x[[4, 0, 0]])


class Driver:
    """A fake torch.cuda that logs calls, and runs what is captured."""

    class OutOfMemoryError(RuntimeError): ...

    def __init__(self, refuses: bool = False) -> None:
        self.log: list[str] = []
        self.refuses = refuses
        self.free = 1 << 40
        driver = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                driver.log.append("wait")

        class CUDAGraph:
            def replay(self) -> None:
                driver.log.append("replay")

        self.Stream, self.CUDAGraph = Stream, CUDAGraph

    def current_stream(self) -> Any:
        return self.Stream()

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append("side")
        yield

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, *, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.log.append("capture")
        yield
        self.free -= 1 << 20
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    def graph_pool_handle(self) -> str:
        return "pool"

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.free, 1 << 40

    def memory_reserved(self, device: Any) -> int:
        return 300

    def max_memory_allocated(self, device: Any) -> int:
        return 200

    def reset_peak_memory_stats(self, device: Any) -> None: ...

    def empty_cache(self) -> None: ...


def test_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs once uncaptured on a side stream, with the streams waiting for each other; then capture, then replays."""
    driver = Driver()
    monkeypatch.setattr(torch, "cuda", driver)
    ran: list[Tensor] = []

    def run() -> Tensor:
        ran.append(torch.zeros(2))
        return ran[-1]

    replay = CudaCapture(torch.device("cpu"))(run)
    assert driver.log == ["wait", "side", "wait", "capture"]
    assert len(ran) == 2
    assert replay() is replay() is ran[1]
    assert driver.log[4:] == ["replay", "replay"]


def test_a_step_that_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Driver(refuses=True))
    with pytest.raises(
        RuntimeError, match=r"in a CUDA graph \(operation not permitted .*enforce_eager=True runs without"
    ):
        CudaCapture(torch.device("cpu"))(lambda: torch.zeros(1))


@pytest.mark.parametrize("eager", [False, True])
def test_what_is_left_on_a_device(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.9 of the memory, less what others use, what the largest step needs, and a MiB for each graph."""
    engine = make_engine(SMALL, "float32", "float32", max_num_seqs=4, num_pages=40, max_model_len=64)
    runner, driver = engine.runner, Driver()
    driver.free = (1 << 40) - 1000
    monkeypatch.setattr(torch, "cuda", driver)
    monkeypatch.setattr(CudaCapture, "key", lambda self: "here")
    if not eager:
        monkeypatch.setattr(
            runner,
            "_new_graphs",
            lambda: DecodeGraphs(runner.model, runner.cache, runner.config, CudaCapture(torch.device("cpu"))),
        )
    graphs = 0 if eager else 3 << 20
    assert runner._left_on_device() == int((1 << 40) * GPU_SHARE) - (1000 - 300 + 200) - graphs
    assert driver.log.count("capture") == (0 if eager else 2)
    assert runner.cache == []
