"""Reports of the benchmark suite, on result files made up by report_samples, and on those that are committed."""

from __future__ import annotations

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from grok_bench import spread
from grok_bench.report import markdown, table
from grok_bench.report.commands import compare_command, report_command
from grok_bench.report.compare import compare
from grok_bench.report.rows import block, headline
from grok_bench.report.units import amount, digits, duration, interval
from grok_bench.schema import ResultFile
from tests import report_samples as samples

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"
NO_TIME = dict.fromkeys(("seconds", "low", "high"))


def invoke(command: click.Command, *args: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)


# --- numbers


def test_numbers_have_three_digits_and_a_unit() -> None:
    values = (0, 0.0123, 1.3, 9.996, 340.4, 12345.6, -2)
    assert [*map(digits, values)] == ["0", "0.0123", "1.30", "10.0", "340", "12,346", "-2.00"]
    seconds = (2.5e-7, 4.03e-4, 9.999e-4, 0.9999, 75)
    assert [*map(duration, seconds)] == ["0.250 µs", "403 µs", "1.00 ms", "1.00 s", "75.0 s"]
    assert interval(0.001, 0.00098, 0.00104) == "[0.980, 1.04]"
    assert interval(0.001, None, None) == ""
    amounts = ((4.5e10, "B/s"), (999.9e9, "FLOP"), (12, "B"))
    assert [amount(*a) for a in amounts] == ["45.0 GB/s", "1.00 TFLOP", "12.0 B"]


# --- tables


def exact() -> ResultFile:
    """One problem whose every number is known."""
    made = samples.kernels()
    ours = samples.score("grok_kernels cpu", [0.0013] * 9, ours=True, roofline=0.92, speedup=1.4)
    peer = samples.score("oneDNN bf16", [0.00182] * 9, bytes=6.8e8, speedup=1.0)
    result = replace(
        made.kernels[0], problem="moe/fp8-even-t16", operations=1.2e9, bytes=3.4e8, floor_seconds=0.0012,
        parameters={"tokens": 16, "routing": "even", "bias": False, "fused": True, "group": None},
        best_peer="oneDNN bf16", scores=[ours, peer],
    )  # fmt: skip
    return replace(made, results=[result])


def terminal(file: ResultFile, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    table.render(file, console)
    return console.export_text()


def test_exact_numbers_in_the_terminal() -> None:
    text = terminal(exact())
    assert "tokens 16, routing even, fused; 1.20 GFLOP in bf16, 340 MB; floor 1.20 ms; rounds kept 21, thrown" in text
    ours, peer = (line.split() for line in text.splitlines() if line.startswith(("grok_kernels cpu", "oneDNN bf16")))
    assert ours == ["grok_kernels", "cpu", "1.30", "ms", "[1.30,", "1.30]", "262", "923", "G", "92%", "1.40", "1.2e-03"]
    assert peer[6:9] == ["374", "659", "G"]  # GB/s of its own bytes, which are twice the problem's


def in_markdown(file: ResultFile) -> str:
    return markdown.render([Path("results/x.json")], [file], Path())


def test_exact_numbers_in_markdown() -> None:
    text = in_markdown(exact())
    row = "| A | moe/fp8-even-t16 | 1.30 ms | \\[1.30, 1.30] | 262 | 923 G | 92% | 1.40 | oneDNN bf16 |"
    assert row in text.splitlines()
    assert "- **A** [x](results/x.json): problems 1; faster than the best" in text


def test_what_has_no_time_is_said() -> None:
    text = " ".join(terminal(replace(samples.kernels(), interrupted=True)).split())
    assert "WRONG: error 3.1e-01 where 1.0e-02 is allowed" in text
    assert "TIMED OUT: more than 30 s a call" in text
    assert "FAILED: RuntimeError: no kernel" in text
    assert text.count("vllm is not installed: pip install vllm") == 1
    assert "vLLM fused_experts_cpu" in text
    assert "interrupted" in text
    assert "AMD EPYC" in terminal(replace(samples.kernels(), results=[]))


def test_nothing_in_a_file_is_read_as_markup() -> None:
    assert "softcap <dropped> [again]" in terminal(samples.kernels(), 200)
    text = in_markdown(samples.kernels())
    assert "FAILED: RuntimeError: no kernel \\| for this" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {10}


@pytest.mark.parametrize("width", [80, 120])
def test_narrow_terminals_wrap_and_lose_nothing(width: int) -> None:
    for file in (exact(), samples.engine()):
        text = terminal(file, width)
        assert all(len(line) <= width for line in text.splitlines())
        words = set(text.split())
        assert {
            word for r in file.results for row in block(r).rows for cell in row.cells.values() for word in cell.split()
        } <= words


def test_a_run_of_an_engine_has_its_rates_and_latencies() -> None:
    file = samples.engine()
    shown = block(file.results[0])
    assert shown.title == "serve grok-1"
    assert "layers 2, dummy, input len 128, request rate 0.1" in shown.sizes
    assert "12.8 output tokens/s" in shown.sizes
    m = file.runs[0].metrics["ttft"]
    assert m
    assert (shown.rows[0].name, shown.rows[0].cells["p50 ms"]) == ("TTFT", f"{m.p50 * 1e3:,.2f}")
    failing = replace(file, results=[replace(file.runs[0], failed=3, completed=47), *file.runs[1:]])
    assert "requests completed 47, FAILED 3" in " ".join(terminal(failing, 200).split())
    assert ("requests failed", "3 of 250") in headline(failing)


# --- comparison


def with_times(file: ResultFile, factor: float, seed: int = 7, peers: bool = False) -> ResultFile:
    """The same measured again, with its own noise: ours, or the peers, so many times slower."""
    rng, results = random.Random(seed), []
    for r in file.kernels:
        scores = []
        for s in r.scores:
            if s.seconds is not None:
                times = [s.seconds * (1.0 if s.ours == peers else factor) * rng.gauss(1, 0.015) for _ in range(21)]
                again = samples.score(s.contestant, times)
                s = replace(s, seconds=again.seconds, low=again.low, high=again.high)
            scores.append(s)
        results.append(replace(r, scores=scores))
    return replace(file, results=results)


@pytest.mark.parametrize(
    ("factor", "threshold", "verdict"),
    [(1.1, 0.05, "regression"), (1.1, 0.2, "slower"), (0.8, 0.05, "faster")],
)
def test_what_moved_is_found(factor: float, threshold: float, verdict: str) -> None:
    a = samples.kernels()
    found = compare(a, with_times(a, factor), threshold)
    ours = [c for c in found.changes if c.a.ours and c.ratio]
    assert len(ours) == 12
    assert {c.verdict for c in ours} == {verdict}
    assert all(abs((c.ratio or 0) / factor - 1) < 0.03 and (c.low or 0) < (c.ratio or 0) < (c.high or 0) for c in ours)
    assert bool(found.of("regression")) == (verdict == "regression")


def test_noise_is_no_regression() -> None:
    """The interval of the ratio holds 1 at least as often as its 95% promise."""
    timed = []
    for seed in range(20):
        a = samples.kernels()
        found = compare(a, with_times(a, 1.0, seed=seed))
        assert not found.of("regression")
        timed += [c.verdict == "no difference" for c in found.changes if c.ratio]
    assert sum(timed) > 0.93 * len(timed)


def test_peers_that_moved_are_no_regression_but_a_warning() -> None:
    a = samples.kernels()
    found = compare(a, with_times(a, 1.3, peers=True))
    assert not found.of("regression")
    assert any("the peers' times in B are 1.3" in w for w in found.warnings)


def first_with(file: ResultFile, **changes: object) -> ResultFile:
    """The file with another first score."""
    first, *rest = file.kernels
    scores = [replace(first.scores[0], **changes), *first.scores[1:]]  # type: ignore[arg-type]
    return replace(file, results=[replace(first, scores=scores), *rest])


def test_what_broke_is_told_and_what_was_repaired() -> None:
    a = samples.kernels()
    b = first_with(a, status="wrong", **NO_TIME)
    assert len(compare(a, b).of("broken")) == len(compare(b, a).of("fixed")) == 1
    assert not compare(a, b).of("regression")


def test_noise_is_neither_broken_nor_a_regression(tmp_path: Path) -> None:
    """A machine too busy for a time says nothing of a kernel."""
    a, b = samples.kernels(), first_with(samples.kernels(), status="noisy", message="too few quiet rounds", **NO_TIME)
    for one, other in ((a, b), (b, a)):
        found = compare(one, other)
        assert len(found.of("too noisy")) == 1
        assert not found.of("broken") + found.of("regression")
        one.save(tmp_path / "a.json")
        other.save(tmp_path / "b.json")
        said = invoke(compare_command, tmp_path / "a.json", tmp_path / "b.json")
        assert said.exit_code == 0
        assert "too noisy: 1" in said.output
    assert "noisy, so no time: too few quiet rounds" in " ".join(terminal(b).split())
    assert ("too noisy for a time", "1") in headline(b)


def test_a_plugin_made_slower_is_a_regression(tmp_path: Path) -> None:
    """A plug-in's contestants are the subject of their run; any other is where it is named."""
    files = tmp_path / "a.json", tmp_path / "b.json"
    peers = [samples.score(name, [0.002] * 9, ours=False) for name in ("grok_kernels cpu", "torch eager")]
    for subject in (True, False):
        for file, seconds in zip(files, (0.001, 0.01), strict=True):
            mine = samples.score("mine", [seconds * (1 + i / 1000) for i in range(9)], ours=subject)
            result = replace(samples.kernels().kernels[0], rounds=9, scores=[mine, *peers])
            replace(samples.kernels(), results=[result]).save(file)
        named = [] if subject else ["--subject", "mi*"]
        said = invoke(compare_command, *files, *named)
        assert (said.exit_code, "regression: 1" in said.output) == (1, True)
        assert invoke(compare_command, *files[::-1], *named).exit_code == 0
    assert invoke(compare_command, *files).exit_code == 0
    with pytest.raises(ValueError, match=r"no contestant matches --subject me: there are mine; grok_kernels cpu"):
        invoke(compare_command, *files, "--subject", "me")


def test_a_win_is_one_only_where_its_interval_leaves_out_1(tmp_path: Path) -> None:
    made = samples.kernels()
    spans = ((1.02, 1.4), (0.98, 1.3), (0.5, 0.9))
    results = []
    for low, high in spans:
        s = samples.score("grok_kernels cpu", [0.001] * 9, ours=True, roofline=0.9, speedup=(low + high) / 2,
                          speedup_low=low, speedup_high=high)  # fmt: skip
        results.append(replace(made.kernels[0], scores=[s]))
    assert ("faster than the best peer", "1 of 3, slower 1, undecided 1") in headline(replace(made, results=results))
    quick = replace(results[0].scores[0], roofline=8.03)
    file = replace(made, results=[replace(results[0], scores=[quick])])
    assert ("faster than the best peer", "0 of 0, slower 0, undecided 0") in headline(file)
    assert ("suspect, above 110% of the roofline", "1") in headline(file)
    assert "803% SUSPECT" in terminal(file)


def test_another_subject_has_its_own_ratios() -> None:
    """Of the rounds where the file has samples, else of the medians and their intervals."""
    scores = [
        samples.score("a", [0.003, 0.0031, 0.0029], ours=True), samples.score("b", [0.002, 0.0021, 0.0019]),
        samples.score("c", [0.001, 0.0011, 0.0009]),
    ]  # fmt: skip
    file = replace(samples.kernels(), results=[replace(samples.kernels().kernels[0], scores=scores)])
    for kept in (False, True):
        if kept:
            times = [[0.003, 0.0031, 0.0029], [0.002, 0.0021, 0.0019], [0.001, 0.0011, 0.0009]]
            several = [replace(s, samples=t) for s, t in zip(scores, times, strict=True)]
            file = replace(file, results=[replace(file.kernels[0], scores=several)])
        (result,) = spread.with_subject(file, ["b"]).kernels
        assert [s.ours for s in result.scores] == [False, True, False]
        assert result.best_peer == "c"
        b = result.scores[1]
        assert b.speedup == pytest.approx(0.5, rel=0.06)
        assert b.speedup_low and b.speedup_high  # noqa: PT018
        assert b.speedup_low < 0.5 < b.speedup_high or kept


def test_few_rounds_decide_nothing_and_other_sizes_are_not_compared() -> None:
    a = exact()
    few = replace(a, results=[replace(a.kernels[0], rounds=4)])
    assert [c.verdict for c in compare(few, with_times(a, 2.0)).changes] == ["no interval", "no interval"]
    b = samples.kernels()
    first, *rest = b.kernels
    found = compare(b, replace(b, results=[replace(first, operations=1e9), *rest]))
    assert found.warnings == [f"{first.problem} is another problem in B, and not compared"]
    assert first.problem not in {c.key[0] for c in found.changes}


def test_engines_are_compared_by_the_medians_of_their_requests() -> None:
    a, slower = samples.engine(), samples.engine(slower=1.5)
    found = compare(a, slower)
    assert {c.key[1] for c in found.of("regression")} == {"ttft"}
    assert len(found.of("regression")) == 5
    assert {c.verdict for c in found.changes if c.key[1] == "e2e"} == {"no difference"}
    failing = replace(a, results=[replace(a.runs[0], failed=3), *a.runs[1:]])
    assert [c.key[1] for c in compare(a, failing).of("broken")] == ["requests failed"]


def test_what_cannot_be_compared_is_refused() -> None:
    kernels = samples.kernels()
    with pytest.raises(ValueError, match=r"'kernels'.*kind 'engine'.* have nothing in common"):
        compare(kernels, samples.engine())
    with pytest.raises(ValueError, match="'cpu', B on 'cuda'"):
        compare(kernels, replace(kernels, environment=samples.environment(device="cuda")))
    with pytest.raises(ValueError, match="nothing in common"):
        compare(kernels, replace(kernels, results=[]))
    other = replace(kernels, environment=samples.environment(chip="Intel Xeon 6972P", torch="2.12.1"))
    assert compare(kernels, other).warnings == [
        "chip: AMD EPYC 9xx5 in A, Intel Xeon 6972P in B", "torch: 2.13.0 in A, 2.12.1 in B"
    ]  # fmt: skip


# --- commands


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The kernels, the same 10% slower, and the engine."""
    a, b, engine = (tmp_path / name for name in ("a.json", "b.json", "engine.json"))
    samples.kernels().save(a)
    with_times(samples.kernels(), 1.1).save(b)
    samples.engine().save(engine)
    return a, b, engine


def test_compare_exit_status(files: tuple[Path, Path, Path]) -> None:
    a, b, _ = files
    worse = invoke(compare_command, a, b)
    assert worse.exit_code == 1
    assert "regression: 12" in worse.output
    assert "moe/grok-1/decode/fp8-even-t1 " in worse.output
    assert invoke(compare_command, a, b, "--threshold", "0.2").exit_code == 0
    assert invoke(compare_command, b, a).exit_code == 0
    same = invoke(compare_command, a, a)
    assert same.exit_code == 0
    assert "regression" not in same.output
    assert "grok_kernels" not in same.output


def test_report_writes_what_is_asked_for(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shown = invoke(report_command, *files[::2])
    assert "moe/grok-1/decode/fp8-even-t1" in shown.output
    assert "TTFT" in shown.output
    md, html = (tmp_path / name for name in ("x.md", "x.html"))
    said = invoke(report_command, *files[::2], "--markdown", md, "--html", html).output
    assert said == f"wrote {md}\nwrote {html}\n"
    assert md.read_text().count("- **") == 2
    page = html.read_text()
    assert not re.search(r"(src|href)=\"http|@import|<link", page)
    assert "softcap &lt;dropped&gt; [again]" in page


def test_the_committed_summary_is_of_the_committed_results(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    paths = sorted((tmp_path / "results").glob("*.json"))
    assert all(path.stat().st_size < 100_000 for path in paths)
    assert invoke(report_command, *paths, "--markdown", tmp_path / "RESULTS.md").exit_code == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == (RESULTS.parent / "RESULTS.md").read_text(), "write it again, as benchmarks/README.md says"
    assert len(text.splitlines()) <= 200
