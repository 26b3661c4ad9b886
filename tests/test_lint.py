"""The check of line lengths finds what it should, and only that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / ".ci/line_length.py"
LONG, FULL = "x" * 121, "é" * 120
FILES = {
    "Makefile": LONG,
    "src/kernel.cuh": f"{FULL}\n{LONG}",
    "docs/page.md": f"{LONG}\n| {LONG} |\n```\n{LONG}\n```\n[a link]({LONG}) and https://{LONG}\n{LONG}",
    "docs/made.md": f"# Results\n\nMade by a command; do not edit.\n{LONG}",
    "module.py": LONG,  # ruff's
    "untracked.h": LONG,
}


def test_long_lines_are_found(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", *(name for name in FILES if name != "untracked.h")], cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    found = [line.rsplit(":", 1)[0] for line in done.stderr.splitlines()]
    assert (done.returncode, found) == (1, ["Makefile:1", "docs/page.md:1", "docs/page.md:7", "src/kernel.cuh:2"])
    subprocess.run(["git", "rm", "-qf", "Makefile", "docs/page.md", "src/kernel.cuh"], cwd=tmp_path, check=True)
    assert subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, check=False).returncode == 0
