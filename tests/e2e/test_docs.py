"""What the documents tell a newcomer to type works, and what they point to exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from grok_engine.cli import main

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *GUIDES,
    ROOT / "CONTRIBUTING.md",
    *(p for f in ("kernels", "csrc", "benchmarks", "grok_engine") for p in (ROOT / f).rglob("*.md")),
]
BLOCKS = [block for path in GUIDES for block in re.findall(r"```(\w+)\n(.*?)```", path.read_text(), re.DOTALL)]
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
TARGETS = {c.split()[1] for c in COMMANDS if c.startswith("make ")}


def test_there_is_something_to_try() -> None:
    assert [c.split()[0] for c in COMMANDS].count("grok-engine") >= 3
    assert {"demo", "test"} <= TARGETS
    assert len(PROGRAMS) >= 4


def test_readme_stays_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("grok-engine")])
def test_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command, comments=True)[1:]) == 0
    assert len(capsys.readouterr().out) > 50


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program: str) -> None:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)#\s]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_paths_in_the_architecture_exist() -> None:
    """Every path from the root that stands between backticks, but those said to be unwritten, and patterns."""
    text = (ROOT / "docs/architecture.md").read_text()
    text = re.sub(r"`[^`]*` \(not written yet\)", "", text)
    paths = re.findall(r"`((?:grok_engine|kernels|csrc|tests|benchmarks)/[\w./*]*)`", text)
    assert len(paths) > 20
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []
