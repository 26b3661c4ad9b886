"""A user's own kernels, ops, sizes and models; what cheats; FlashInfer-Trace. No time is looked at."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import grok_bench
from grok_bench.kernels import contestant, lineup, problems, quiet, shapes
from grok_bench.kernels.problems import select
from grok_bench.schema import Ceiling, KernelResult, Score, load
from grok_engine.cli import main
from tests.report_samples import environment

Captured = pytest.CaptureFixture[str]
PLUGIN = """
import torch
import grok_bench

KEPT = {}
BUFFER = torch.zeros(64, 64)


def softmax(x, scale):
    return torch.softmax(x.float() * scale, -1).to(x.dtype)


def operations(p):
    return 5.0 * p["rows"] * p["columns"]


@grok_bench.problem("softmax", {"rows": (2, 64), "columns": (512,)}, reference=softmax, operations=operations)
def inputs(p, device):
    return torch.randn(p["rows"], p["columns"], device=device).bfloat16(), 0.5


grok_bench.model("mine", like="grok-1", d_model=768, num_heads=6, num_kv_heads=2)


@grok_bench.contestant("softmax")
def honest(x, scale):
    return torch.softmax(x * scale, -1)


@grok_bench.contestant("softmax")
def more_exact(x, scale):
    return torch.softmax(x.float() * scale, -1)


@grok_bench.contestant("softmax")
def transposed(x, scale):
    return torch.softmax(x.t() * scale, 0).t()


@grok_bench.contestant("softmax")
def a_row_less(x, scale):
    return torch.softmax(x * scale, -1)[1:]


@grok_bench.contestant("softmax")
def remembers(x, scale):
    if x.data_ptr() not in KEPT:
        KEPT[x.data_ptr()] = torch.softmax(x * scale, -1)
    return KEPT[x.data_ptr()]


@grok_bench.contestant("softmax", prepare=True)
def computes_beforehand(x, scale):
    y = torch.softmax(x * scale, -1)
    return lambda: y


@grok_bench.contestant("softmax")
def in_place(x, scale):
    return torch.softmax(x.mul_(scale), -1)
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(contestant, "_contestants", {})
    monkeypatch.setattr(problems, "FAMILIES", list(problems.FAMILIES))
    monkeypatch.setattr(shapes, "_own", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    shapes.shape.cache_clear()


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    return file


def bench(*arguments: str | Path) -> int:
    return main(["bench", *map(str, arguments)])


def scores(file: Path) -> dict[str, Score]:
    (result,) = load(file).kernels
    return {s.contestant: s for s in result.scores}


def test_what_cheats_is_wrong_and_named(plugin: Path, tmp_path: Path) -> None:
    """Another dtype, stride or shape; a result kept by address, or from the preparation; an input changed."""
    file, table = tmp_path / "found.json", tmp_path / "found.csv"
    options = ("--plugin", plugin, "--smoke", "--threads", "1", "--json", file, "--csv", table)
    assert bench("kernels", "softmax/*", "--set", "rows=5", *options) == 1
    found = scores(file)
    assert {name: s.status for name, s in found.items() if s.status != "wrong"} == {"honest": "ok"}
    assert all(s.ours for s in found.values())
    why = {name: s.message for name, s in found.items()}
    assert why["more_exact"] == "the dtype is torch.float32, torch.bfloat16 is due"
    assert why["transposed"] == "the stride is (1, 5), (64, 1) is due"
    assert why["a_row_less"] == "the shape is (4, 64), (5, 64) is due"
    assert why["in_place"] == "it changes its input x"
    for name in ("remembers", "computes_beforehand"):
        assert why[name].endswith("is allowed, after the timing, with inputs changed in place")
        assert (found[name].error or 0) > 0.01
        assert found[name].seconds is None
    lines = list(csv.DictReader(table.open()))
    assert {line["contestant"]: line["status"] for line in lines}["remembers"] == "wrong"
    assert float(next(line for line in lines if line["contestant"] == "honest")["seconds"]) == found["honest"].seconds


def test_any_shape_op_and_model(plugin: Path, capsys: Captured) -> None:
    lineup.load([plugin])
    named = {
        "rms_norm/grok-1/*/t5": "rms_norm/grok-1/decode/t5",
        "moe/grok-1-tp8/*/fp8-even-t300": "moe/grok-1-tp8/prefill/fp8-even-t300",
        "paged_attention/mine/prefill/bf16-p16-q7-l100": "paged_attention/mine/prefill/bf16-p16-q7-l100",
        "rms_norm/grok-1:d_model=640/decode/t3": "rms_norm/grok-1:d_model=640/decode/t3",
        "softmax/rows7-columns9": "softmax/rows7-columns9",
    }
    for pattern, name in named.items():
        (problem,) = select([pattern])
        assert problem.name == name
        assert select([problem.name]) == [problem]
    assert select(["rms_norm/mine/*/t1"])[0].shape.d_model == 768
    wider = select(["rms_norm/grok-1/*/t*"], {"tokens": 5, "d_model": 512})
    assert [p.name for p in wider] == ["rms_norm/grok-1:d_model=512/decode/t5"]
    assert wider[0].shape.d_model == 512
    assert bench("list", "softmax/*", "--set", "columns=7") == 0
    assert capsys.readouterr().out.split() == ["softmax/rows2-columns7", "softmax/rows64-columns7"]
    assert "softmax/rows{rows}-columns{columns}   2 problems" in problems.overview()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rms_norm/grok-1/*/t0"], "no problem matches"),
        (["rms_norm/grok-9/decode/t5"], "there is no model 'grok-9': expected one of grok-1"),
        (["moe/grok-1/*/fp8-even-t1", "--set", "routing=odd"], "--set routing=odd: expected one of even, zipf, one"),
        (["rms_norm/grok-1/*/t1", "--set", "tokens=many"], "--set tokens=many: expected a number above 0"),
        (["rms_norm/grok-1/*/t1", "--set", "toks=5"], "--set toks=5: these problems have tokens, and sizes of a model"),
        (["rms_norm/grok-1/*/t1", "--set", "tokens"], "--set 'tokens': expected NAME=VALUE, as in tokens=5"),
        (["rms_norm/grok-1/*/t1", "--subject", "me"], "no contestant matches 'me': there are grok_kernels"),
    ],
)
def test_what_is_no_size_or_subject_is_told(arguments: list[str], message: str, capsys: Captured) -> None:
    assert bench("kernels", "--smoke", *arguments) == 2
    assert message in capsys.readouterr().err


def test_any_contestant_may_be_the_subject(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "found.json"
    options = ("--smoke", "--threads", "1", "--no-compile", "--subject", "torch*", "--json", file)
    assert bench("kernels", "rms_norm/grok-1/*/t5", *options) == 0
    found = scores(file)
    assert {name for name, s in found.items() if s.ours} == {"torch eager"}
    assert all(s.speedup_low is not None for s in found.values() if s.seconds)
    assert (load(file).kernels[0].best_peer or "").startswith("grok_kernels")
    assert "problems: 1\nfaster than the best peer: " in capsys.readouterr().out


def test_the_cap_holds(tmp_path: Path, capsys: Captured) -> None:
    """Nothing begins after it, and what it cuts is noisy and not a failure."""
    file = tmp_path / "found.json"
    names = ("softmax/rows2-columns512", "softmax/rows64-columns512")
    slow = tmp_path / "slow.py"
    slow.write_text(
        PLUGIN.split("grok_bench.model")[0]
        + "import time\n\n@grok_bench.contestant('softmax')\ndef sleeps(x, scale):\n    time.sleep(600)\n"
    )
    assert bench("kernels", *names, "--plugin", slow, "--smoke", "--cap", "0.5", "--json", file) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "skipped: softmax/rows64-columns64" in out
    assert {name: s.status for name, s in scores(file).items()} == {"sleeps": "noisy"}
    assert "the cap on the time of the whole run was reached" in out


# A busy machine


def test_a_busy_machine_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (7.2, 0.0, 0.0))
    assert quiet.load(2) == ["the load average is 7.2 on 2 cores: others are running"]
    assert quiet.load(16) == []
    switches = iter((100, 100_000))
    monkeypatch.setattr(quiet, "_switches", lambda: next(switches))
    (warning,) = quiet.Switches().warning()
    assert "involuntary context switches a second" in warning


def test_a_ceiling_far_below_the_kept_one_is_warned_of() -> None:
    quick, slow = ({"read": Ceiling(unit="B/s", rate=rate)} for rate in (15e9, 1.7e9))
    assert quiet.below(quick, environment()) == []
    assert quiet.below(slow, environment(chip="another")) == []
    assert quiet.below(slow, environment()) == ["the read ceiling is 1.7e+09 B/s, 11% of the best that was seen here"]
    assert json.loads(quiet.file().read_text())["AMD EPYC 9xx5, 2 threads, torch 2.13.0"]["read"] == 15e9


# Other programs


def test_pytest_benchmark_takes_the_same_plugins(plugin: Path) -> None:
    """Whatever calls a function again and again can time them: they are checked before and after."""
    found = {str(c).split()[1]: c for c in grok_bench.calls("softmax/rows2-*", plugins=[plugin], small=True)}
    with found["honest"] as call:
        assert {call().shape for _ in range(9)} == {(2, 64)}
    with pytest.raises(AssertionError, match=r"softmax/rows2-columns64 remembers: wrong: error \d"), found["remembers"]:
        pass
    with pytest.raises(AssertionError, match=r"more_exact: wrong: the dtype is"), found["more_exact"]:
        pass


def test_a_flashinfer_trace_is_written_and_read(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is read as problems with the same data and results, and has what the schema asks for."""
    folder, file = tmp_path / "trace", tmp_path / "found.json"
    options = ("--smoke", "--threads", "1", "--no-compile", "--plugin", plugin, "--subject", "honest")
    names = (
        "rms_norm/grok-1/decode/t4",
        "grouped_gemm/grok-1/decode/w13-int8-even-t4",
        "moe/grok-1/decode/fp8-even-t4",
        "softmax/rows2-*",
    )
    assert bench("kernels", *names, *options, "--trace", folder) == 0
    definitions = [json.loads(path.read_text()) for path in folder.rglob("definitions/**/*.json")]
    assert {d["op_type"] for d in definitions} == {"rms_norm", "grouped_gemm", "moe", "softmax"}
    for d in definitions:
        tensors = [*d["inputs"].values(), *d["outputs"].values()]
        assert {axis for t in tensors for axis in t["shape"] or ()} == set(d["axes"])
        assert not set(d["inputs"]) & set(d["outputs"])
        assert "def run(" in d["reference"]
        assert "grok_bench" not in d["reference"]
    monkeypatch.setattr(contestant, "_contestants", {})
    monkeypatch.setattr(problems, "FAMILIES", [f for f in problems.FAMILIES if f.modelled])
    again = ("rms_norm-*", "grouped_gemm-*", "moe-*", "softmax-*")
    assert bench("kernels", *again, "--plugin", folder, "--smoke", "--threads", "1", "--json", file) == 0
    found = {r.op: {s.contestant.split("_softmax")[0]: s.status for s in r.scores} for r in load(file).kernels}
    softmax = found.pop("softmax-rows2-columns64")
    assert (softmax.pop("honest"), set(softmax.values())) == ("ok", {"wrong"})
    assert len(found) == 3
    assert {status for states in found.values() for status in states.values()} <= {"ok", "missing"}


def test_a_solution_may_fill_its_results_and_may_need_building(tmp_path: Path) -> None:
    """The schema's default: results come last among the arguments."""
    definition = {
        "name": "scale_n8", "op_type": "scale", "axes": {"m": {"type": "var"}, "n": {"type": "const", "value": 8}},
        "inputs": {"x": {"shape": ["m", "n"], "dtype": "float32"}, "by": {"shape": None, "dtype": "float32"}},
        "outputs": {"y": {"shape": ["m", "n"], "dtype": "float32"}},
        "reference": "import torch\n\ndef run(x, by):\n    return x * by\n",
    }  # fmt: skip
    spec = {"language": "python", "target_hardware": ["cpu"], "entry_point": "a/main.py::fill"}
    code = "import torch\n\ndef fill(x, by, y):\n    torch.mul(x, by, out=y)\n"
    solution = {"name": "fills", "definition": "scale_n8", "author": "me", "spec": spec,
                "sources": [{"path": "a/main.py", "content": code}]}  # fmt: skip
    cuda = {**solution, "name": "built", "spec": {**spec, "language": "cuda"}}
    inputs = {"x": {"type": "random"}, "by": {"type": "scalar", "value": 3.0}}
    workload = {"definition": "scale_n8", "workload": {"axes": {"m": 5}, "inputs": inputs, "uuid": "w1"}}
    for path, value in (
        ("definitions/a.json", definition), ("solutions/a.json", solution), ("solutions/b.json", cuda),
        ("workloads/a.jsonl", workload),
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(value))
    file = tmp_path / "found.json"
    assert bench("kernels", "scale_n8/w1", "--plugin", tmp_path, "--smoke", "--json", file) == 0
    found = scores(file)
    assert (found["fills"].status, found["built"].status) == ("ok", "missing")
    assert found["built"].message == "cuda needs building: run it with flashinfer-bench"
    result = load(file).kernels[0]
    assert isinstance(result, KernelResult)
    assert result.bytes == 2 * 5 * 8 * 4
