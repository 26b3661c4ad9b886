"""Contestants as plug-ins, and what the peers of a GPU are given, with stand-ins for their packages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grok_bench import contestant as decorator
from grok_bench.kernels import cases, contestant, lineup, peers_gpu, peers_kt
from grok_bench.kernels.attention import Attend
from grok_bench.kernels.case import error
from grok_bench.kernels.data import Weights
from grok_bench.kernels.problems import Problem, select
from grok_bench.schema import KernelResult, load
from grok_engine.cli import main

README = Path(__file__).parents[1] / "benchmarks" / "README.md"


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestant, "_contestants", {})
    lineup.load()


def small(pattern: str) -> Problem:
    return select([pattern])[0].small()


def check(name: str, pattern: str) -> None:
    """A GPU's contestant gives what it should, at a problem on the CPU."""
    problem = small(pattern)
    (c,) = contestant.entrants(problem, "cuda", [name])
    case = cases.build(problem, "cpu")
    for inputs in case.inputs:
        got = c.bind(inputs)()
        got = case.shown(got() if callable(got) else got, inputs)
        assert error(got, case.expected(inputs)) <= case.tolerance


def test_the_plugin_of_the_docs_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(# mine\.py\n.*?)```", README.read_text(), re.DOTALL)
    assert sum(bool(line) for line in code.splitlines()) <= 10
    plugin, file = tmp_path / "mine.py", tmp_path / "found.json"
    plugin.write_text(code)
    options = ["--smoke", "--threads", "1", "--plugin", str(plugin), "--json", str(file)]
    assert main(["bench", "kernels", "*/grok-1/decode/w2-*-even-t4", "rms_norm/grok-1/decode/t4", *options]) == 0
    results = [r for r in load(file).results if isinstance(r, KernelResult)]
    mine = [s for r in results for s in r.scores if s.contestant.startswith("mine")]
    assert {r.op for r in results if any(s in mine for s in r.scores)} == {"rms_norm", "grouped_gemm"}
    assert all(s.status == "ok" and s.ours for s in mine)  # the subject, against all others
    assert not any(s.ours for r in results for s in r.scores if s not in mine)


def test_contestants_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="'mine' is for op 'softmax', expected one of paged_attention, grouped_gemm"):
        decorator("softmax", "mine")(lambda x: x)
    decorator("rms_norm", "mine")(lambda x, weight, eps: x)
    with pytest.raises(ValueError, match="op rms_norm already has a contestant 'mine'"):
        decorator("rms_norm", "mine")(lambda x, weight, eps: x)
    with pytest.raises(ValueError, match="is for device 'tpu', expected cpu or cuda"):
        decorator("rms_norm", "other", devices=("tpu",))(lambda x, weight, eps: x)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    assert peers_gpu.missing.__wrapped__().endswith("): pip install sgl-deep-gemm==0.1.4.post1 apache-tvm-ffi==0.1.11")


def test_kt_kernel_is_skipped_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kt_kernel", None)
    for fmt in peers_kt.KINDS:
        (c,) = contestant.entrants(small(f"moe/grok-1/decode/{fmt}-even-t4"), "cpu", ["kt-kernel*"])
        assert c.missing().startswith("kt-kernel is not installed: pip install --no-deps --target DIR kt-kernel")


@pytest.mark.parametrize(("fmt", "columns"), [("int4", 32), ("int4_g128", 128), ("fp8", 128)])
def test_kt_kernel_gets_the_weights_of_the_problem(fmt: str, columns: int) -> None:
    weights = Weights.random(2, 256, 384, fmt)
    values, scales = peers_kt._planes(weights.values, weights.scale, columns)
    for e in range(2):
        if fmt == "fp8":
            w_NK = values[e].float() * scales[e].repeat_interleave(128, 0).repeat_interleave(128, 1)
        else:
            u_KN = torch.stack([values[e] >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
            w_NK = ((u_KN - 8) * scales[e].repeat_interleave(columns, 0)).T
        assert torch.equal(w_NK, weights.float(e))


def test_patterns_choose_contestants_and_the_reference_comes_when_called() -> None:
    problem = small("rms_norm/grok-1/decode/t4")
    names = [c.name for c in contestant.entrants(problem, "cuda")]
    assert "grok_kernels triton" in names
    assert "torch eager" in names
    assert "grok_kernels reference" not in names
    assert [c.name for c in contestant.entrants(problem, "cpu", ["*ref*"])] == ["grok_kernels reference"]


def dequantized(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Rows (M, K) with scales for each group of 128."""
    x, scale = pair
    return x.float() * scale.repeat_interleave(128, dim=-1)[..., : x.shape[-1]]


def blocks(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Weights (E, N, K) with scales for each block of 128 x 128."""
    w, scale = pair
    n, k = w.shape[1:]
    return w.float() * scale.repeat_interleave(128, 1)[:, :n].repeat_interleave(128, 2)[:, :, :k]


@pytest.mark.parametrize("routing", ["even", "zipf", "one"])
def test_deep_gemm_is_given_its_layouts(monkeypatch: pytest.MonkeyPatch, routing: str) -> None:
    def contiguous(x: Any, w: Any, out: Tensor, owner: Tensor) -> None:
        assert out.shape[0] % 128 == 0
        weights = blocks(w)
        for block in range(0, len(owner), 128):  # a block is of one expert, and what is in no expert is left
            owners = set(owner[block : block + 128].tolist()) - {-1}
            assert len(owners) == 1
        for e in range(len(weights)):
            out[owner == e] = (dequantized(x)[owner == e] @ weights[e].t()).bfloat16()

    def masked(x: Any, w: Any, out: Tensor, counts: Tensor, expected: int) -> None:
        assert counts.dtype == torch.int32
        assert expected >= 1
        for e, n in enumerate(counts.tolist()):
            out[e, :n] = (dequantized(x)[e, :n] @ blocks(w)[e].t()).bfloat16()

    module = SimpleNamespace(
        get_mk_alignment_for_contiguous_layout=lambda: 128,
        m_grouped_fp8_gemm_nt_contiguous=contiguous,
        fp8_m_grouped_gemm_nt_masked=masked,
    )
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    check("DeepGEMM fp8, contiguous", f"grouped_gemm/grok-1/decode/w13-fp8xfp8-{routing}-t4")
    check("DeepGEMM fp8, masked", f"grouped_gemm/grok-1/decode/w2-fp8xfp8-{routing}-t4")


@pytest.mark.parametrize("queries", [1, 4, 256])
def test_flex_attention_is_told_of_softcap_temperature_and_mask(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    """Run as torch's plain function: compiling it is for a GPU."""
    from grok_bench.kernels import peers_torch
    from grok_bench.kernels.attention import Cache, plain
    from grok_bench.kernels.ours import reference

    monkeypatch.setattr(peers_torch, "_compiled_once", lambda function: function)
    torch.manual_seed(0)
    cache = Cache.random(2, 2, 256, 64, 16, False, "cpu")
    q = torch.randn(2 * queries, 4, 64).bfloat16()
    starts, lengths = torch.tensor([0, queries, 2 * queries]).int(), torch.tensor([256, 256]).int()
    inputs = Attend(q, cache, queries, 0.125, 30.0, 0, 100, starts, lengths)
    expected = reference("paged_attention", inputs.args)
    assert error(peers_torch._flex(inputs)(), expected) < 0.01
    assert error(peers_torch._flex(plain(inputs))(), expected) > 0.01
