"""Reports of the benchmark suite, on result files made up by report_samples."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from grok_bench.report import markdown, page, table
from grok_bench.report.commands import compare_command, report_command
from grok_bench.report.compare import CompareError, compare, ratio_interval
from grok_bench.report.figures import MissingLibrary, pictures, write
from grok_bench.report.merge import merged
from grok_bench.report.results import main as results_main
from grok_bench.report.results import update_results
from grok_bench.report.rows import blocks, headline
from grok_bench.report.sweeps import common_name, sweeps
from grok_bench.report.units import amount, digits, duration, interval
from grok_bench.schema import Ceiling, KernelResult, ResultFile, load
from tests import report_samples as samples


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


needs_matplotlib = pytest.mark.skipif(not has_matplotlib(), reason="pip install 'grok-engine[bench]'")


# --- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.0123"), (1.3, "1.30"), (9.996, "10.0"), (340.4, "340"), (12345.6, "12,346"), (-2, "-2.00")],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5e-7, "0.250 µs"),
        (4.03e-4, "403 µs"),
        (9.999e-4, "1.00 ms"),
        (0.00145, "1.45 ms"),
        (0.9999, "1.00 s"),
        (75, "75.0 s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_interval_and_amount_keep_their_unit() -> None:
    assert interval(0.001, 0.00098, 0.00104) == "[0.980, 1.04]"
    assert interval(0.001, None, None) == ""
    assert amount(4.5e10, "B/s") == "45.0 GB/s"
    assert amount(999.9e9, "FLOP") == "1.00 TFLOP"
    assert amount(12, "B") == "12.0 B"


# --- tables


def exact() -> ResultFile:
    """One problem whose every number is known."""
    made = samples.kernels()
    ours = samples.score(
        "grok_kernels cpu", [0.0013] * 9, ours=True, bytes_per_second=2.6e11, operations_per_second=9.2e11,
        share_of_roofline=0.92, times_best_peer=1.4,
    )  # fmt: skip
    peer = samples.score("oneDNN bf16", [0.00182] * 9, bytes_per_second=1.9e11, times_best_peer=1.0)
    result: KernelResult = replace(
        made.results[0], problem="moe-fp8-grok1-even-t16", operations=1.2e9, bytes=3.4e8, floor_seconds=0.0012,
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
    assert "tokens 16, routing even, fused; 1.20 GFLOP in bf16, 340 MB; floor 1.20 ms; 21 rounds kept, 2 thrown" in text
    (line,) = (line for line in text.splitlines() if line.startswith("grok_kernels cpu"))
    assert line.split() == [
        "grok_kernels", "cpu", "1.30", "ms", "[1.30,", "1.30]", "260", "920", "92%", "1.40", "1.2e-03"
    ]  # fmt: skip
    assert "GFLOP/s" in text
    assert "TFLOP/s  of" not in text


def test_fast_chips_are_told_in_tflops() -> None:
    file = exact()
    file = replace(file, ceilings=file.ceilings | {"fp8": Ceiling(unit="FLOP/s", rate=1.4e15)})
    assert blocks(file)[0].columns[3] == "TFLOP/s"
    assert blocks(file)[0].rows[0].cells[3].text == "0.920"


def test_exact_numbers_in_markdown() -> None:
    text = markdown.render(exact())
    assert "| **grok_kernels cpu** | 1.30 ms | \\[1.30, 1.30] | 260 | 920 | 92% | 1.40 | 1.2e-03 |" in text
    assert "| oneDNN bf16 | 1.82 ms | \\[1.82, 1.82] | 190 |  |  | 1.00 | 1.2e-03 |" in text
    assert "# Kernels on AMD EPYC 9xx5, 2026-11-23\n" in text
    assert "- faster than the best peer: **1 of 1**" in text


@pytest.mark.parametrize("show", [terminal, markdown.render])
def test_what_has_no_time_is_said(show: Callable[[ResultFile], str]) -> None:
    text = " ".join(show(samples.kernels()).split())
    assert "WRONG, not timed: error 3.1e-01 where 1.0e-02 is allowed" in text
    assert "TIMED OUT: more than 30 s a call" in text
    assert "FAILED: RuntimeError: no kernel" in text
    assert text.count("vllm is not installed: pip install vllm") == 1
    assert "vLLM fused_experts_cpu" in text


def test_nothing_in_a_file_is_read_as_markup() -> None:
    assert "softcap <dropped> [again]" in terminal(samples.kernels(), 200)
    text = markdown.render(samples.kernels())
    assert "softcap &lt;dropped> \\[again]" in text
    assert "no kernel \\| for this" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_narrow_terminals_lose_no_number(width: int) -> None:
    for file in (samples.kernels(), samples.engine()):
        text = terminal(file, width)
        assert all(len(line) <= width for line in text.splitlines())
        words = set(text.replace(",", " ").replace("[", " ").replace("]", " ").split())
        for name, cell in (
            (n, c) for b in blocks(file) for row in b.rows for n, c in zip(b.columns, row.cells, strict=False)
        ):
            if name == "error" and width == 80:  # the one column that may go, for the table to fit
                continue
            assert set(cell.text.replace(",", " ").replace("[", " ").replace("]", " ").split()) <= words


def test_engine_rows_are_named_by_what_differs() -> None:
    (block,) = blocks(samples.engine())
    assert block.title == "grok-1 serve"
    assert "layers 2, dummy, input len 128" in block.sizes
    assert [row.name for row in block.rows][:2] == ["request rate 0.1, weights int8", "request rate 0.2, weights int8"]
    assert block.rows[0].cells[1].text == "12.8"


def test_failed_requests_are_said() -> None:
    file = samples.engine()
    file.results[0] = replace(file.results[0], failed=3, completed=47)  # type: ignore[call-overload]
    assert "3 of 50 requests FAILED" in " ".join(terminal(file, 200).split())
    assert ("requests failed", "3 of 500") in headline(file)


def test_interrupted_runs_say_so() -> None:
    file = replace(exact(), interrupted=True)
    assert "interrupted" in terminal(file)
    assert "interrupted" in markdown.render(file)


def test_empty_files_are_shown_too() -> None:
    for file in (samples.kernels(), samples.engine()):
        empty = replace(file, results=[])
        assert "AMD EPYC" in terminal(empty)
        assert "AMD EPYC" in markdown.render(empty)


def test_sweeps_cover_every_problem_once() -> None:
    results: list[Any] = samples.kernels().results
    found = sweeps(results)
    assert sorted(r.problem for s in found for r in s.results) == sorted(r.problem for r in results)
    first = found[0]
    assert (first.name, first.over, first.xs) == ("moe-fp8-grok1-even", "tokens", [1, 16, 64, 512])
    assert [s.over for s in found if s.op == "paged_attention"] == ["keys", "keys"]
    assert common_name(["a-t1-fp8", "a-t16-fp8"]) == "a-*-fp8"


def test_runs_of_one_engine_in_several_files_are_one(tmp_path: Path) -> None:
    file = samples.engine()
    paths = []
    for i, run in enumerate(file.results[:3]):
        paths.append(tmp_path / f"rate{i}.json")
        replace(
            file,
            results=[run],
            created=f"2026-11-23T1{i}:00:00Z",
            environment=samples.environment(clock_mhz=2600.0 + i),
        ).save(paths[-1])  # type: ignore[list-item]
    samples.kernels().save(tmp_path / "kernels.json")
    other = replace(file, environment=samples.environment(torch="2.12.0"))
    named = merged([(p.stem, load(p)) for p in (*paths, tmp_path / "kernels.json")] + [("other", other)])
    assert [name for name, _ in named] == ["rate0", "kernels", "other"]
    assert named[0][1].results == file.results[:3]
    assert named[0][1].created == "2026-11-23T12:00:00Z"
    shown = invoke(report_command, *paths).output
    assert shown.count("grok-1 serve") == 1
    assert "request rate 0.4" in shown


# --- comparison


def with_times(file: ResultFile, factor: float, seed: int = 7, peers: bool = False) -> ResultFile:
    """The same measured again, with its own noise: ours, or the peers, so many times slower."""
    rng = random.Random(seed)
    results: list[KernelResult] = []
    for r in file.results:
        assert isinstance(r, KernelResult)
        scores = []
        for s in r.scores:
            if s.seconds is None:
                scores.append(s)
                continue
            times = [s.seconds * (1.0 if s.ours == peers else factor) * rng.gauss(1, 0.015) for _ in range(21)]
            scores.append(replace(s, seconds=sorted(times)[10], samples=times))
        results.append(replace(r, scores=scores))
    return replace(file, results=results)


def test_a_slowdown_of_ten_percent_is_found() -> None:
    a = samples.kernels()
    found = compare(a, with_times(a, 1.10))
    ours = [c for c in found.changes if c.ours and c.ratio]
    assert len(ours) == 25
    assert {c.verdict for c in ours} == {"regression"}
    assert all(1.07 < (c.ratio or 0) < 1.13 and (c.low or 0) > 1 for c in ours)
    assert not any(c.ours for c in found.changes if c.verdict in ("slower", "faster"))


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_regression(seed: int) -> None:
    a = samples.kernels()
    found = compare(a, with_times(a, 1.0, seed=seed))
    assert not found.regressions
    timed = [c for c in found.changes if c.ratio]
    assert sum(c.verdict == "same" for c in timed) > 0.85 * len(timed)


def test_an_improvement_is_no_regression() -> None:
    a = samples.kernels()
    found = compare(a, with_times(a, 0.8))
    assert not found.regressions
    assert {c.verdict for c in found.changes if c.ours and c.ratio} == {"faster"}


def test_the_threshold_decides_what_is_a_regression() -> None:
    a = samples.kernels()
    b = with_times(a, 1.10)
    assert compare(a, b, 0.05).regressions
    assert not compare(a, b, 0.2).regressions
    assert {c.verdict for c in compare(a, b, 0.2).changes if c.ours and c.ratio} == {"slower"}


def test_peers_that_moved_are_no_regression_but_a_warning() -> None:
    a = samples.kernels()
    b = with_times(a, 1.3, peers=True)
    found = compare(a, b)
    assert not found.regressions
    assert any("the peers' times in B are 1.3" in w for w in found.warnings)


def test_what_broke_is_a_regression_and_what_was_repaired_is_not() -> None:
    a = samples.kernels()
    (first, *rest) = a.results
    assert isinstance(first, KernelResult)
    broken = replace(first.scores[0], status="wrong", seconds=None, samples=[])
    b = replace(a, results=[replace(first, scores=[broken, *first.scores[1:]]), *rest])
    assert [c.verdict for c in compare(a, b).regressions] == ["broken"]
    assert not compare(b, a).regressions
    assert [c.verdict for c in compare(b, a).changes if c.verdict == "fixed"] == ["fixed"]


def test_the_bootstrap_holds_what_it_says() -> None:
    """Of samples from one distribution about 95% of intervals hold 1; the same input gives the same interval."""
    rng = random.Random(1)
    held = 0
    for _ in range(200):
        a, b = (tuple(rng.lognormvariate(0, 0.1) for _ in range(21)) for _ in range(2))
        found = ratio_interval(a, b, draws=500)
        assert found is not None
        held += found[0] <= 1 <= found[1]
    assert 0.9 <= held / 200 <= 1.0
    assert ratio_interval((1.0, 1.1, 1.2, 1.3, 1.4), (2.0, 2.2, 2.1, 2.3, 2.4)) == ratio_interval(
        (1.0, 1.1, 1.2, 1.3, 1.4), (2.0, 2.2, 2.1, 2.3, 2.4)
    )
    assert ratio_interval((1.0,) * 4, (2.0,) * 9) is None


def test_few_samples_decide_nothing() -> None:
    a = exact()
    (r,) = a.results
    assert isinstance(r, KernelResult)
    few = replace(a, results=[replace(r, scores=[replace(s, samples=[]) for s in r.scores])])
    found = compare(few, with_times(a, 2.0))
    assert [c.verdict for c in found.changes] == ["unsure", "unsure"]


def test_a_problem_of_another_size_is_not_compared() -> None:
    a = samples.kernels()
    (first, *rest) = a.results
    larger = replace(a, results=[replace(first, operations=1e9), *rest])  # type: ignore[call-overload]
    found = compare(a, larger)
    assert found.warnings == ["moe-fp8-grok1-even-t1 is another problem in B, and not compared"]
    assert "moe-fp8-grok1-even-t1" not in {c.what for c in found.changes}


def test_failing_requests_are_a_regression_and_names_are_short(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file = samples.engine()
    (first, *rest) = file.results
    worse = replace(file, results=[replace(first, failed=3), *rest])  # type: ignore[call-overload]
    worse.save(tmp_path / "worse.json")
    shown = invoke(compare_command, files[2], tmp_path / "worse.json")
    assert shown.exit_code == 1
    (line,) = (line for line in shown.output.splitlines() if "broken" in line and "requests failed" in line)
    assert line.split() == ["request_rate=0.1", "weights=int8", "requests", "failed", "ok", "failed", "broken"]
    assert "not timed in both" not in shown.output


def slower_engine(file: ResultFile, factor: float) -> ResultFile:
    rng = random.Random(3)
    runs: list[Any] = []
    for run in file.results:
        times = [
            replace(q, ttft=q.ttft and q.ttft * factor * rng.gauss(1, 0.01), e2e=q.e2e and q.e2e * rng.gauss(1, 0.01))
            for q in run.requests  # type: ignore[union-attr]
        ]
        runs.append(replace(run, requests=times))  # type: ignore[call-overload]
    return replace(file, results=runs)


def test_engines_are_compared_by_their_requests() -> None:
    a = samples.engine()
    found = compare(a, slower_engine(a, 1.5))
    assert {c.who for c in found.regressions} == {"ttft"}
    assert len(found.regressions) == 10
    assert {c.verdict for c in found.changes if c.who == "e2e"} == {"same"}
    assert {c.verdict for c in found.changes if c.who == "output tokens per second"} == {"unsure"}
    assert not compare(slower_engine(a, 1.5), a).regressions


def test_repeated_runs_give_rates_an_interval_and_less_is_worse() -> None:
    rng = random.Random(4)

    def repeated(rate: float) -> ResultFile:
        run = samples.run(0.2, random.Random(0))
        runs = [replace(run, output_tokens_per_second=rate * rng.gauss(1, 0.01)) for _ in range(8)]
        return replace(samples.engine(), results=runs)

    a, b = repeated(100.0), repeated(80.0)
    assert [c.who for c in compare(a, b).regressions] == ["output tokens per second"]
    assert not compare(b, a).regressions
    assert "faster" in {c.verdict for c in compare(b, a).changes}


def test_what_cannot_be_compared_is_refused() -> None:
    kernels, engine = samples.kernels(), samples.engine()
    with pytest.raises(CompareError, match="'kernels' and B of kind 'engine'"):
        compare(kernels, engine)
    with pytest.raises(CompareError, match="'cpu', B on 'cuda'"):
        compare(kernels, replace(kernels, environment=samples.environment(device="cuda")))
    with pytest.raises(CompareError, match="no problem in common"):
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


def invoke(command: click.Command, *args: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in args])


def test_result_files_survive_a_round_trip(files: tuple[Path, Path, Path]) -> None:
    assert load(files[0]) == samples.kernels()
    assert load(files[2]) == samples.engine()


def test_compare_exit_status(files: tuple[Path, Path, Path]) -> None:
    a, b, _ = files
    worse = invoke(compare_command, a, b)
    assert worse.exit_code == 1
    assert "26 regressions" in worse.output or "25 regressions" in worse.output
    assert "moe-fp8-grok1-even-t1 " in worse.output
    assert invoke(compare_command, a, b, "--threshold", "0.2").exit_code == 0
    assert invoke(compare_command, b, a).exit_code == 0
    same = invoke(compare_command, a, a)
    assert same.exit_code == 0
    assert "no regression" in same.output
    assert "grok_kernels" not in same.output
    assert "grok_kernels" in invoke(compare_command, a, a, "--all").output
    assert invoke(compare_command, a, b, "--threshold", "-1").exit_code == 2


def test_another_schema_is_refused_with_its_name(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text('{"schema": "grok-bench/0"}')
    error = invoke(compare_command, files[0], old).exception
    assert "old.json has schema 'grok-bench/0', expected 'grok-bench/1'" in str(error)


def test_report_in_the_terminal_and_as_markdown(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shown = invoke(report_command, *files[::2])
    assert shown.exit_code == 0
    assert "moe-fp8-grok1-even-t1" in shown.output
    assert "request rate 0.1," in shown.output
    assert "295 · 519 ms" in shown.output
    path = tmp_path / "x.md"
    assert invoke(report_command, *files[::2], "--markdown", path).output == f"wrote {path}\n"
    assert path.read_text().count("\n# ") + path.read_text().startswith("# ") == 2


def test_results_document(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    assert "There are none yet." in update_results(folder)
    for path in files[::2]:
        path.rename(folder / path.name)
    text = update_results(folder)
    assert text.index("(results/engine.json)") < text.index("(results/a.json)")  # the newest first
    assert text.index("## Engine on") < text.index("## Kernels on")
    assert invoke(results_main, folder, "--check").exit_code == 1
    assert invoke(results_main, folder).exit_code == 0
    assert (tmp_path / "RESULTS.md").read_text() == text
    assert invoke(results_main, folder, "--check").exit_code == 0


def test_without_matplotlib_one_line_says_what_to_install(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """In a process of its own, since whoever ran before may have imported it."""
    code = f"""
import sys
sys.modules["matplotlib"] = None
from grok_bench.report.commands import report_command
for option in (["--html", {str(tmp_path / "x.html")!r}], ["--figures", {str(tmp_path / "x")!r}]):
    try:
        report_command.main([{str(files[0])!r}, *option], standalone_mode=False)
    except ValueError as error:
        print(error)
report_command.main([{str(files[0])!r}], standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ())
    line = "figures need matplotlib: pip install 'grok-engine[bench]'"
    assert done.stdout.splitlines()[:2] == [line, line]
    assert "moe-fp8-grok1-even-t1" in done.stdout
    assert not (tmp_path / "x.html").exists()
    assert not (tmp_path / "x").exists()


def environ() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


# --- figures and the page


@needs_matplotlib
def test_figures_are_written_and_say_what_they_show(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    assert invoke(report_command, files[0], files[2], "--figures", folder).exit_code == 0
    names = {p.name for p in folder.iterdir()}
    drawn = ("a-roofline", "a-speedup", "a-time-moe", "a-time-grouped_gemm", "a-time-paged_attention", "engine-latency")
    for stem in (*drawn, *(f"engine-timeline-{i + 1}" for i in range(2))):
        for theme in ("light", "dark"):
            assert f"{stem}-{theme}.png" in names
            svg = (folder / f"{stem}-{theme}.svg").read_text()
            assert "AMD EPYC 9xx5, 2 threads · 2026-11-23 · commit abc1234" in svg
            assert (folder / f"{stem}-{theme}.png").read_bytes()[:4] == b"\x89PNG"
    texts = {stem: svg_texts((folder / f"{stem}-light.svg").read_text()) for stem in drawn}
    assert {"read 45.0 GB/s", "int8 1.90 TFLOP/s", "rms_norm-d6144-t1024"} <= texts["a-roofline"]
    assert "moe-fp8-grok1-even (1–512 tokens)" in texts["a-roofline"]
    assert {"1.20×", "vs torch", "ours FAILED", "attention-prefill512-h48-g8-l32768"} <= texts["a-speedup"]
    assert {"floor", "grok_kernels cpu", "oneDNN bf16, prepacked", "tokens", "512"} <= texts["a-time-moe"]
    assert {"output tokens/s", "objective", "0.4/s", "weights int8"} <= texts["engine-latency"]
    assert "keys" in texts["a-time-paged_attention"]


def svg_texts(svg: str) -> set[str]:
    return {re.sub(r"<[^>]*>", "", found).strip() for found in re.findall(r"<text.*?</text>", svg, re.DOTALL)}


@needs_matplotlib
def test_figures_are_the_same_bytes_again(tmp_path: Path) -> None:
    write([("k", exact())], tmp_path / "one")
    write([("k", exact())], tmp_path / "two")
    first = sorted((tmp_path / "one").glob("*.svg"))
    assert [p.name for p in first] == [f"k-{f}-{t}.svg" for f in ("roofline", "speedup") for t in ("dark", "light")]
    for path in first:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@needs_matplotlib
@pytest.mark.parametrize("theme", ["LIGHT", "DARK"])
def test_no_text_lies_on_another_or_leaves_the_picture(theme: str) -> None:
    from matplotlib.text import Text as FigureText

    from grok_bench.report import style

    chosen = getattr(style, theme)
    for file in (samples.kernels(), samples.engine(), exact(), samples.extreme()):
        for picture in pictures(file):
            with style.themed(chosen):
                figure = picture.draw(chosen)
                figure.draw_without_rendering()
                page_box = figure.bbox
                boxes = []
                for text in figure.findobj(lambda o: isinstance(o, FigureText) and o.get_visible() and o.get_text()):
                    box = text.get_window_extent()
                    ticks = {t for a in figure.axes for t in (*a.get_xticklabels(), *a.get_yticklabels())}
                    if text in ticks and not shown(text, figure):
                        continue
                    assert page_box.x0 <= box.x0, (picture.name, text.get_text())
                    assert box.x1 <= page_box.x1 + 1, (picture.name, text.get_text())
                    assert page_box.y0 <= box.y0, (picture.name, text.get_text())
                    assert box.y1 <= page_box.y1, (picture.name, text.get_text())
                    if not text.get_rotation():
                        boxes.append((box.padded(-1), text.get_text()))
            for i, (a, name) in enumerate(boxes):
                for b, other in boxes[i + 1 :]:
                    assert not a.overlaps(b), (picture.name, name, other)


def shown(text: Any, figure: Any) -> bool:
    """Whether a label of a tick lies along its axis: those out of its limits are not drawn."""
    x, y = text.get_window_extent().x0 / 2 + text.get_window_extent().x1 / 2, text.get_window_extent().y0
    return any(a.bbox.padded(2).x0 <= x <= a.bbox.padded(2).x1 or a.bbox.y0 - 2 <= y <= a.bbox.y1 for a in figure.axes)


@needs_matplotlib
def test_colours_are_distinct_and_text_can_be_read() -> None:
    from grok_bench.report.style import THEMES

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for theme in THEMES:
        roles = theme.roles()
        assert len(set(roles.values())) == len(roles)
        paper = luminance(theme.paper)
        for name, colour in roles.items():
            if name not in ("paper", "rule", "soft"):
                low, high = sorted((luminance(colour), paper))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (theme.name, name)


class Balanced(HTMLParser):
    """Every tag closed in its order, no id twice."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "action"):
                self.loads.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@needs_matplotlib
def test_the_page_is_whole_and_loads_nothing(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert invoke(report_command, files[0], files[2], "--html", path).exit_code == 0
    text = path.read_text()
    assert not re.search(r"https?://|@import|<link|url\((?!#)", text)
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    assert all(load.startswith("#") and load[1:] in parser.ids for load in parser.loads)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(parser.ids)
    shown = "".join(parser.text)
    assert "WRONG, not timed: error 3.1e-01 where 1.0e-02 is allowed: softcap <dropped> [again]" in shown
    assert "prefers-color-scheme: dark" in text
    assert 'data-value="0.0' in text
    # every colour of the figures is a variable, so that dark is dark
    assert not re.search(r"#[0-9a-f]{6}", text[text.index("<main>") :])


@needs_matplotlib
def test_the_page_of_one_file_and_of_none_timed() -> None:
    file = samples.kernels()
    assert "<h1>Kernels on AMD EPYC 9xx5, 2026-11-23</h1>" in page.render([("a.json", exact())])
    nothing = [replace(r, scores=[s for s in r.scores if s.seconds is None]) for r in file.results]  # type: ignore[union-attr]
    text = page.render([("a.json", replace(file, results=nothing))])  # type: ignore[arg-type]
    assert "<svg" not in text
    assert "see below" in text


def test_pictures_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingLibrary, match=r"grok-engine\[bench\]"):
        pictures(exact())
