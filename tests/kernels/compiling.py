"""Modules that print what Triton's compiler does, each run in a process of its own: under TRITON_INTERPRET=1, which the
tests set, nothing is compiled. A second Triton, the GPU machine's, may lie in a folder beside the environment's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OTHER = "3.6"  # the version that comes with torch 2.11
OTHER_AT = Path(os.environ.get("GROK_TEST_TRITON", Path(sys.prefix) / f"triton-{OTHER}"))  # what `make setup` fills


@cache
def printed(module: str, *arguments: str, other: bool = False) -> list[dict[str, Any]]:
    """The JSON objects that `python -m module` prints, a line each; `other` by the second Triton."""
    path = [str(OTHER_AT)] * other + [str(ROOT), str(ROOT / "kernels")]
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
