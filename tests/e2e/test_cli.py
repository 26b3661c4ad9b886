"""The command line as a person meets it: what it prints, where, and with which status."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grok_kernels
from grok_engine.cli import _Shown, main
from tests.checkpoint.sparse import RELEASE_BYTES, write_sparse_release

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = str(ROOT / "tests/data/goldens/g8-a-emb128-k16")
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "COLUMNS": "100"}
Captured = pytest.CaptureFixture[str]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grok_engine.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=ENV, timeout=300, check=False)


def test_generate_continues_text_and_a_seed_repeats_it(capsys: Captured) -> None:
    arguments = ["generate", "--prompt", "My dear Watson,", "--max-tokens", "12", "--seed", "3"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out
    assert len(first.out.strip()) > 5
    assert first.err == ""  # no progress bar, no statistics, off a terminal
    assert main([*arguments[:-1], "4"]) == 0
    assert capsys.readouterr().out != first.out


def test_generate_reads_standard_input() -> None:
    by_option = run("generate", "--prompt", "The king", "--max-tokens", "8", "--temperature", "0")
    by_stdin = run("generate", "--max-tokens", "8", "--temperature", "0", stdin="The king\n")
    assert by_option.returncode == by_stdin.returncode == 0, by_stdin.stderr
    assert by_option.stdout == by_stdin.stdout != "\n"


def test_generate_streams() -> None:
    """The first piece is there while the process still runs."""
    command = [sys.executable, "-m", "grok_engine.cli", "generate", "--prompt", "I", "--max-tokens", "250"]
    with subprocess.Popen([*command, "--temperature", "0"], stdout=subprocess.PIPE, env=ENV) as process:
        assert process.stdout is not None
        piece = os.read(process.stdout.fileno(), 64)
        assert piece
        assert process.poll() is None
        assert process.stdout.read() != b"\n"
    assert process.returncode == 0


def test_generate_stats_go_to_standard_error(capsys: Captured) -> None:
    assert main(["generate", "--prompt", "The", "--max-tokens", "5", "--temperature", "0", "--stats"]) == 0
    captured = capsys.readouterr()
    for word in ("prompt", "tokens/s", "time to first token", "peak memory", " backend", "moe"):
        assert word in captured.err
        assert word not in captured.out
    native = grok_kernels.backends()["moe"]["cpu"].available
    assert f"{'cpu' if native else 'reference'} backend" in re.sub(r"cpu\+reference", "cpu", captured.err)
    memory = re.search(r"peak memory\s+([\d,]+) MB", captured.err)
    assert memory
    assert 50 < int(memory[1].replace(",", "")) < 20_000


def test_generate_with_token_ids_needs_no_tokenizer(capsys: Captured) -> None:
    assert main(["generate", "--model", GOLDEN, "--token-ids", "5,6,7", "--max-tokens", "4", "--temperature", "0"]) == 0
    ids = [int(t) for t in capsys.readouterr().out.split(",")]
    assert 1 <= len(ids) <= 4
    assert all(0 <= t < 1024 for t in ids)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "--model", "/no/such"], ["/no/such", "tiny"]),
        (["generate", "--model", GOLDEN, "--prompt", "hi"], ["'hi'", "no tokenizer"]),
        (["generate", "--model", GOLDEN, "--token-ids", "5,x"], ["5,x", "integers"]),
        (["generate", "--model", GOLDEN, "--token-ids", "1024"], ["1024", "0..1023"]),
        (["generate", "--model", GOLDEN, "--token-ids", "5", "--prompt", "a"], ["--prompt", "--token-ids"]),
        (["generate", "--prompt", ""], ["empty"]),
        (["generate", "--prompt", "a", "--max-tokens", "0"], ["max_tokens=0", "integer"]),
        (["generate", "--prompt", "a", "--max-tokens", "many"], ["--max-tokens", "many", "integer"]),
        (["generate", "--prompt", "a", "--temperature", "-1"], ["-1"]),
        (["generate", "--prompt", "a", "--temperature", "nan"], ["nan"]),
        (["generate", "--prompt", "a", "--top-p", "1.5"], ["1.5"]),
        (["generate", "--prompt", "a", "--seed", "-4"], ["-4"]),
        (["generate", "--prompt", "a", "--dtype", "fp7"], ["fp7", "bfloat16", "float32"]),
        (["generate", "--prompt", "a", "--weights", "int3"], ["int3", "int8"]),
        (["generate", "--prompt", "a", "--device", "abacus"], ["abacus"]),
        (["inspect", "/no/such"], ["/no/such"]),
        (["inspect", str(ROOT / "tests")], ["tests", "ckpt-0"]),
        (["inspect"], ["PATH"]),
        (["plan", "--gpu", "h9"], ["h9", "h100-80gb"]),
        (["plan", "--gpus", "3"], ["3", "expected"]),
        (["plan", "--gpus", "0"], ["0", "expected"]),
        (["plan", "--batch", "-2"], ["-2"]),
        (["plan", "--context", "9999999"], ["9999999"]),
        (["plan", "grok-7"], ["grok-7", "grok-1"]),
        (["plan", "--weights", "int3"], ["int3", "fp8"]),
        (["plan", "--weights", "int4"], ["int4", "fp8"]),
        (["plan", "--cpu", "fast"], ["fast", "GB/s"]),
        (["plan", "--cpu", "0"], ["0.0", "GB/s"]),
        (["plan", "--cpu", "460", "--gpus", "8"], ["--cpu", "--gpus"]),
        (["plan", "--head", "int4"], ["head='int4'", "fp8"]),
        (["frobnicate"], ["frobnicate"]),
        (["generate", "--frobnicate"], ["--frobnicate"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], named: list[str], capsys: Captured) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("grok-engine: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    for word in named:
        assert word in captured.err


def test_debug_shows_the_traceback() -> None:
    plain = run("plan", "--gpus", "3")
    assert (plain.returncode, plain.stderr.count("\n"), plain.stdout) == (2, 1, "")
    debug = run("plan", "--gpus", "3", "--debug")
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


def test_no_prompt_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["generate"]) == 2
    assert "no prompt" in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f'"{sys.executable}" -m grok_engine.cli inspect --json "{GOLDEN}" | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENV, timeout=300, check=False)
    assert done.stdout.strip() == "{"
    assert done.stderr == ""


def test_help_and_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"grok-engine \d+\.\d+\.\d+\n", capsys.readouterr().out)
    for command in ("generate", "inspect", "convert", "plan"):
        assert main([command, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out
    assert main([]) == 2
    assert "generate" in capsys.readouterr().out


def test_inspect_json_and_verify(capsys: Captured) -> None:
    assert main(["inspect", GOLDEN, "--json", "--verify"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["verified"]
    assert len(report["tensors"]) == report["files"] == 26
    assert {t["scale_layout"] for t in report["tensors"]} >= {"8 groups of 86 input rows", "1 group of 128 input rows"}


def test_inspect_and_plan_of_the_full_size_release(tmp_path: Path) -> None:
    """770 sparse files of the release's exact lengths; that no weight is read is why this is quick."""
    assert write_sparse_release(tmp_path) == RELEASE_BYTES == 318_239_886_140
    shown = run("inspect", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert "770 files" in shown.stdout
    assert "318,239,886,140 bytes" in shown.stdout
    planned = run("plan", str(tmp_path), "--gpu", "h100-80gb", "--gpus", "8", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["fits"]


def test_plan_says_grok_1s_sizes(capsys: Captured) -> None:
    assert main(["plan", "grok-1", "--gpu", "h100-80gb", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    for figure in ("315.7 B parameters", "83.8 B active", "318.2 GB as released", "fits"):
        assert figure in text


def test_only_a_process_of_its_own_keeps_what_it_imported_from_the_collector(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    assert main(["plan"]) == 0
    assert not frozen  # called by another program, as here
    monkeypatch.setattr(sys, "argv", ["grok-engine", "plan"])
    assert main() == 0
    assert frozen == [True]


def test_a_warning_goes_through_what_draws_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich replaces `sys.stderr` while it draws; written past it, a warning would stand in the bar's own line."""
    shown, drawn = _Shown(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", drawn)
    shown.emit(logging.makeLogRecord({"msg": "210 matrices"}))
    assert drawn.getvalue() == "210 matrices\n"
