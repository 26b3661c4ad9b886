"""Runs modules that print what Triton's compiler does, each in a process of its own, because the tests set
TRITON_INTERPRET=1, under which nothing is compiled. A second Triton may be installed beside the environment's."""

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
OTHER_AT = Path(os.environ.get("GROK_TEST_TRITON", Path(sys.prefix) / f"triton-{OTHER}"))  # `make test` installs it


@cache
def printed(module: str, *arguments: str, other: bool = False) -> list[dict[str, Any]]:
    """The JSON objects that `python -m module` prints, one per line; `other`: with the second version of Triton."""
    path = [str(OTHER_AT)] * other + [str(ROOT), str(ROOT / "kernels")]
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
