"""The benchmark of a whole model beside llama.cpp runs to its end at a tiny size. No time of ours is looked at."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grok_kernels
from grok_bench.schema import load

STATUS = grok_kernels.backends()["rms_norm"]["cpu"]
if not STATUS.available:
    pytest.skip(STATUS.reason, allow_module_level=True)

import benchmarks.cpu_model.__main__ as whole_model  # noqa: E402
from benchmarks import bench_step_share  # noqa: E402
from benchmarks.cpu_model.engines import Load  # noqa: E402
from benchmarks.cpu_model.models import Sizes, small_configuration, write_models  # noqa: E402
from benchmarks.cpu_model.tool import Tool, version  # noqa: E402
from benchmarks.model_1b import write  # noqa: E402
from grok_bench.kernels.entrant import Dropped  # noqa: E402

PROBLEMS = ["prefill/t16", "decode/b1", "decode/b2"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_model_runs_without_a_peer_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert whole_model.main(["--smoke", "--threads", "1", "--kinds", "Q8_0", "--json", str(file)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no peer: --peer takes the llama-batched-bench of llama.cpp or of a fork" in out
    assert "tokens/s" in out
    assert "MB at the peak" in out
    results = load(file).kernels
    assert [r.problem.removeprefix("model/grok-1.30b-Q8_0/") for r in results] == PROBLEMS
    for r in results:
        timed = [s.contestant for s in r.scores if s.seconds]
        released = "grok-engine, the release's int8"
        assert timed == ["grok-engine", "grok-engine, int8 rows", released, f"{released}, int8 rows"]
        assert r.rounds == 1


# Stands for llama-batched-bench: the table of both forks, after lines of a log.
PROGRAM = """
import sys
if "--version" in sys.argv:
    sys.exit("version: 1.2 (of a test)")
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
pp, tg, pl = (given[name] for name in ("-npp", "-ntg", "-npl"))
assert given["-m"].endswith(".gguf")
assert int(given["-c"]) >= int(pl) * (int(pp) + int(tg))
print("a log | of the load")
print("|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |")
print("|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|")
print(f"|{pp:>6} |{tg:>7} |{pl:>5} |     48 |    2.500 |   204.14 |    0.500 |    58.21 |    3.000 |   189.73 |")
"""


def command(folder: Path, program: str) -> str:
    (folder / "program.py").write_text(program)
    return f"{sys.executable} {folder / 'program.py'}"


def test_a_peer_given_as_a_command_takes_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model,) = write_models(tmp_path, small_configuration(), ["Q8_0"]).values()
    file = tmp_path / "found.json"
    peer = f"a fork={command(tmp_path, PROGRAM)}"
    arguments = ["--smoke", "--threads", "1", "--file", str(model), "--peer", peer, "--json", str(file)]
    assert whole_model.main([*arguments, "--only", "decode/*", "--contestant", "a fork", "*rows"]) == 0
    results = load(file).kernels
    assert [r.problem for r in results] == ["model/Q8_0/decode/b1", "model/Q8_0/decode/b2"]
    for r in results:
        assert [(s.contestant, s.seconds is not None) for s in r.scores] == [
            ("grok-engine, int8 rows", True),
            ("a fork", True),
        ]
        assert r.scores[1].seconds == 0.5 / 2  # two tokens a request
        assert r.parameters["a fork"] == "1.2 (of a test)"
    assert "a fork: 1.2 (of a test)" in capsys.readouterr().out


def test_a_program_is_timed_by_its_own_table(tmp_path: Path) -> None:
    tool = Tool(command(tmp_path, PROGRAM), Path("a.gguf"), Load(1, 512, 0), 60.0)
    tool.check()
    assert tool.time(1) == 2.5
    assert tool.peak > 1 << 20
    assert Tool(command(tmp_path, PROGRAM), Path("a.gguf"), Load(16, 16, 5), 60.0).time(1) == 0.1


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("import sys; print('a line'); sys.exit('cannot read a.gguf')", "failed", "exit status 1.*cannot read a.gguf"),
        (PROGRAM + "print('|  1 |  2 |')", "failed", "exit status 0, expected one row"),
        ("import time; time.sleep(60)", "timeout", "more than 1 s"),
    ],
)
def test_a_program_that_fails_is_dropped(tmp_path: Path, program: str, status: str, message: str) -> None:
    tool = Tool(command(tmp_path, program), Path("a.gguf"), Load(1, 16, 4), 1.0 if status == "timeout" else 60.0)
    with pytest.raises(Dropped) as dropped:
        tool.time(0)
    assert dropped.value.args[0] == status
    assert re.search(message, dropped.value.args[1])


def test_a_program_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Dropped, match="missing"):
        Tool(str(tmp_path / "none"), Path("a.gguf"), Load(1, 16, 4), 60.0).check()
    assert version(str(tmp_path / "none")).startswith("unknown (")


@pytest.mark.parametrize("text", ["ik", "=path", "ik="])
def test_a_peer_without_a_name_or_a_command_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        whole_model.main(["--smoke", "--peer", text])
    assert "expected NAME=COMMAND" in capsys.readouterr().err


def test_a_step_reads_the_experts_that_its_rows_hit() -> None:
    work = Sizes(dense=100, experts=800, hit=0.25, layers=0, head=0, formats="")
    assert work.read(1) == 300
    assert work.read(2) == 100 + 800 * (1 - 0.75**2)


def test_a_folder_with_another_model_is_refused(tmp_path: Path) -> None:
    config = small_configuration()
    write_models(tmp_path, config, ())
    write_models(tmp_path, config, ())
    with pytest.raises(ValueError, match="holds another model"):
        write_models(tmp_path, replace(config, num_layers=3), ())


def test_a_decode_step_is_taken_apart(tmp_path: Path) -> None:
    write(tmp_path, small_configuration())
    for eager in (False, True):
        spent = bench_step_share.measure(tmp_path, requests=2, steps=3, eager=eager)
        assert {"moe", "paged_attention", "grouped_gemm"} <= spent.keys()
        assert 0 < spent["rest"] < spent["whole"]
        assert all(0 < spent[part] < spent["whole"] for part in bench_step_share.PARTS)
