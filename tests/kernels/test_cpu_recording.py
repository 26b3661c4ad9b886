"""Runs on the CPU kept as native calls: the same bits as the run itself, from what its tensors then hold."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight, cpu, registry

pytestmark = pytest.mark.skipif("cpu" in registry._missing, reason="no native CPU kernels")

T, D, N = 3, 64, 128
ONES = torch.ones(D)
W = Weight.of(torch.randn(1, N, D, generator=torch.Generator().manual_seed(0)).bfloat16())


def assert_again(x: Tensor, run: Callable[[], Any]) -> cpu.Recorded:
    """Recorded on some values of x, replayed on others."""
    recorded = cpu.record(run)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        expected = [r.clone() for r in run()]
        found = recorded()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert all(a is b for a, b in zip(recorded(), found, strict=True))
    return recorded


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def test_native_calls_and_views_alone_are_one_step() -> None:
    x = bf16(T, D)

    def run() -> Any:
        y = grok_kernels.grouped_gemm(grok_kernels.rms_norm(x, ONES), W)
        left, right = y.view(T, 2, D).split([1, 1], 1)
        h, z = grok_kernels.sandwich_norm(x, left.view(T, D), None, ONES)
        return h, grok_kernels.quantize_int8(z)[0], right

    recorded = assert_again(x, run)
    assert len(recorded._steps) == 1
    seconds = recorded.seconds()
    assert set(seconds) == {"grouped_gemm", "quantize_int8", "rms_norm", "sandwich_norm"}
    assert min(seconds.values()) > 0


def test_torch_s_own_ops_between() -> None:
    """New tensors, copies made only where one is needed, in-place ops, lists of tensors."""
    x, at = bf16(T, D), torch.tensor([2, 0])

    def run() -> Any:
        a = grok_kernels.rms_norm(x * 2.0, ONES)
        a.mul_(0.5).add_(1)
        y = grok_kernels.grouped_gemm(a, W).view(T, 2, D)[:, 1]
        b = grok_kernels.rms_norm(y.contiguous(), ONES)
        c = grok_kernels.rms_norm(y.reshape(T * D // 32, 32), ONES[:32])
        rows = torch.nn.functional.embedding(at, b)
        top, where = b.float().topk(3)
        return a, b, c, rows, top, where, *torch._foreach_mul([a, b], 2.0)

    assert len(assert_again(x, run)._steps) > 5


def test_ops_that_write_their_arguments() -> None:
    q, pages = torch.zeros(T, 2, 8), torch.zeros(2, 2, 4, 8)  # (P, G, S, C)
    positions, slots = torch.arange(T, dtype=torch.int32), torch.tensor([5, -1, 0], dtype=torch.int32)
    table = grok_kernels.rope_table(16, 8, 10000.0)

    def run() -> Any:
        keys, values = pages.clone(), pages.clone()
        return grok_kernels.rope_store_kv(q, q, q, keys, values, positions, slots, table), keys, values

    assert_again(q, run)
    with grok_kernels.use_backend("reference"):
        assert_again(q, run)


def test_another_backend_s_op_stays_that_backend_s() -> None:
    x = bf16(T, 1000)
    ones = torch.ones(1000)

    def run() -> Any:
        with grok_kernels.use_backend("reference"):
            a = grok_kernels.rms_norm(x, ones)
        return a, grok_kernels.rms_norm(a, ones)

    assert len(assert_again(x, run)._steps) == 2


def test_text_and_missing_arguments_are_kept() -> None:
    x = bf16(T, D)
    w13, w2 = torch.randn(2, 256, D).bfloat16(), torch.randn(2, D, 128).bfloat16()
    weights, experts = torch.ones(T, 1), torch.tensor([[0], [1], [0]], dtype=torch.int32)

    def run() -> Any:
        activation = "".join(["gelu", "_tanh"])  # gone after the call
        return (grok_kernels.moe(x, weights, experts, Weight.of(w13), Weight.of(w2), activation, "none"),)

    assert_again(x, run)


def test_what_a_replay_checks() -> None:
    """A call that fails in a replay says what the op says, and the recording can be replayed again."""
    x, offsets = bf16(T, D), torch.tensor([0, T], dtype=torch.int32)
    recorded = cpu.record(lambda: grok_kernels.grouped_gemm(x, W, offsets))
    offsets[1] = T + 1
    with pytest.raises(ValueError, match=r"offsets is \[0, 4\], expected to ascend from 0 to M=3"):
        recorded()
    offsets[1] = T
    assert torch.equal(recorded(), grok_kernels.grouped_gemm(x, W, offsets))
    assert grok_kernels.rms_norm(x, ONES) is not grok_kernels.rms_norm(x, ONES)  # new tensors outside of replays


def test_the_profiler_sees_replays() -> None:
    x = torch.ones(T, D)
    recorded = cpu.record(lambda: grok_kernels.rms_norm(x, ONES))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        recorded()
    assert [event.name for event in profile.events()] == ["rms_norm"]


def test_runs_that_cannot_be_recorded() -> None:
    x = torch.ones(T, D)
    with pytest.raises(RuntimeError, match=r"_local_scalar_dense.* gives a value, 192.0, that may be another"):
        cpu.record(lambda: grok_kernels.rms_norm(x * x.sum().item(), ONES))
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(3,\)"):
        cpu.record(lambda: grok_kernels.rms_norm(x, ONES[:3]))
    with pytest.raises(ValueError, match="another one is active in this thread"):
        cpu.record(lambda: cpu.record(lambda: grok_kernels.rms_norm(x, ONES)))
    assert torch.equal(cpu.record(lambda: grok_kernels.rms_norm(x, ONES))(), grok_kernels.rms_norm(x, ONES))


def test_calls_of_other_threads_are_not_kept() -> None:
    x = torch.ones(T, D)

    def run() -> Tensor:
        thread = threading.Thread(target=lambda: grok_kernels.rms_norm(x, ONES))
        thread.start()
        thread.join()
        return grok_kernels.rms_norm(x, ONES)

    recorded = cpu.record(run)
    assert recorded._native.calls == 1
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(recorded()))
    thread.start()
    thread.join()
    assert torch.equal(found[0], grok_kernels.rms_norm(x, ONES))


def test_what_is_recorded_now() -> None:
    found = cpu.recordable()
    assert found is not None
    assert "cpu" in found
    with grok_kernels.use_backend("reference"):
        assert cpu.recordable() is None


def test_replays_past_the_end() -> None:
    x = torch.ones(T, D)
    recorded = cpu.record(lambda: grok_kernels.rms_norm(x, ONES))
    with pytest.raises(ValueError, match="replay of the calls 0 to 2, there are 1"):
        recorded._native.replay(0, 2)


def resize(x: Tensor) -> None:
    x.resize_(6, D)


def replace_data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[Tensor], None]:
    def change(x: Tensor) -> None:
        x.data = torch.ones(shape, dtype=dtype)

    return change


CHANGES = {
    "resized": (resize, r"x has shape \[6, 64\], strides \[64, 1\] and dtype Float in a replay, expected .* \[3, 64\]"),
    "more rows": (replace_data((5, D)), r"x has shape \[5, 64\]"),
    "another dtype": (replace_data((T, D), torch.bfloat16), "x has .* dtype BFloat16 in a replay, expected .*Float"),
    "other memory": (replace_data((T, D)), "x lies in other memory than when it was recorded"),
    "less memory": (lambda x: x.untyped_storage().resize_(0), "x lies in other memory"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_replay_refuses_tensors_that_have_changed(change: str) -> None:
    x = torch.ones(T, D)
    recorded = cpu.record(lambda: grok_kernels.rms_norm(x, ONES))
    CHANGES[change][0](x)
    with pytest.raises(ValueError, match=f"rms_norm: {CHANGES[change][1]}"):
        recorded()


def test_a_replay_refuses_weights_that_have_changed() -> None:
    """Each of these once wrote beyond the kept results."""
    x, weight = torch.ones(T, D), torch.ones(1, N, D)
    recorded = cpu.record(lambda: grok_kernels.grouped_gemm(x, Weight.of(weight)))
    weight.data = torch.ones(1, 2 * N, D)
    with pytest.raises(ValueError, match=r"grouped_gemm: weight has shape \[1, 256, 64\]"):
        recorded()


@pytest.mark.parametrize("change", CHANGES)
def test_a_replay_refuses_what_torch_s_own_ops_read(change: str) -> None:
    """A view keeps the memory that its base had: a replay would read that for ever."""
    x = torch.ones(T, D)
    recorded = cpu.record(lambda: grok_kernels.rms_norm(x[:, : D // 2] * 2, ONES[: D // 2]))
    CHANGES[change][0](x)
    with pytest.raises(ValueError, match=r"aten\.slice\.Tensor: self (has shape|lies in other memory)"):
        recorded()


def test_a_replay_refuses_results_that_have_changed() -> None:
    x = torch.ones(T, D)
    for change, message in (
        (lambda r: r.resize_(6, D), r"a result of the replay has shape \[3, 64\].* expected .*\[6, 64\]"),
        (replace_data((T, D)), "a result of the recording has other strides or other memory since"),
        (lambda r: r.untyped_storage().resize_(0), "a result of the recording has shape .* a storage of 0"),
    ):
        recorded = cpu.record(lambda: grok_kernels.rms_norm(x, ONES))
        with torch.inference_mode():
            change(recorded())
        with pytest.raises(ValueError, match=message):
            recorded()


def test_below_the_recorder_a_replay_still_keeps_to_its_results() -> None:
    from grok_kernels import _C

    x, recording = torch.ones(T, D), _C.Recording()
    result = recording.record(lambda: _C.rms_norm(x, ONES, 1e-5))
    x.resize_(6, D)
    with pytest.raises(ValueError, match=r"rms_norm: a result of the replay has shape \[6, 64\]"):
        recording.replay(0, 1)
    x.resize_(T, D).fill_(2.0)
    recording.replay(0, 1)
    assert torch.equal(result, _C.rms_norm(x, ONES, 1e-5))


def test_one_use_at_a_time() -> None:
    x, refused = torch.ones(T, D), list[str]()

    class Again(torch.utils._python_dispatch.TorchDispatchMode):
        """Calls the recording in the middle of its own replay, here and in another thread."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            threads = [threading.Thread(target=self.attempt), threading.Thread(target=self.attempt)]
            for thread in threads:
                thread.start()
                thread.join()
            self.attempt()
            return func(*args, **(kwargs or {}))

        def attempt(self) -> None:
            try:
                recorded()
            except ValueError as error:
                refused.append(str(error))

    recorded = cpu.record(lambda: grok_kernels.rms_norm(x * 2, ONES))
    expected = recorded().clone()
    with Again():
        recorded()
    assert len(refused) >= 3
    assert all("called again before its last call has ended" in message for message in refused)
    assert torch.equal(recorded(), expected)


def test_a_native_recording_is_used_by_one_thread_at_a_time() -> None:
    from grok_kernels import _C

    recording, refused = _C.Recording(), list[str]()

    def attempt() -> None:
        for use in (recording.seconds, recording.verify, lambda: recording.replay(0, 0)):
            with pytest.raises(ValueError, match="Recording: it is in use") as error:
                use()
            refused.append(str(error.value))

    def run() -> None:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    recording.record(run)
    assert len(refused) == 3
    recording.replay(0, 0)
