"""The wheel of `make wheel` in an environment that has torch, and neither a compiler nor Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from grok_engine import __version__

pytestmark = pytest.mark.skipif(os.environ.get("GROK_TEST_MORE") != "1", reason="needs a wheel; `make more` builds one")
MINOR = ".".join(torch.__version__.split(".")[:2])
# the packages that torch and the engine need are those of the environment that runs this test
USE = """
import sys
sys.modules["triton"] = None
import grok_kernels, grok_engine.cli
assert all(m.__file__.startswith(sys.prefix) for m in (grok_kernels, grok_engine)), grok_kernels.__file__
assert grok_kernels.backends()["moe"]["cpu"].available
grok_engine.cli.main()
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (found,) = (Path(__file__).parents[1] / "dist").glob(f"grok_engine-{__version__}+torch{MINOR}-{python}-*.whl")
    return found


def test_it_runs_where_torch_runs_and_holds_none_of_it(wheel: Path) -> None:
    tag = re.search(r"manylinux_2_(\d+)_x86_64\.whl$", wheel.name)
    assert tag, wheel.name
    assert int(tag[1]) <= 28, f"{wheel.name} needs a newer glibc than torch's own wheels"
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert libraries == [f"grok_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]


def test_it_generates_without_a_compiler_and_triton(wheel: Path, tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path / "nowhere"), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    python = str(tmp_path / "bin/python")
    subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", str(wheel)], env=env, check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path)}))
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # a path alone: no editable project through it
    command = [python, "-c", USE, "generate", "--prompt", "My dear Watson,", "--max-tokens", "8", "--stats"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "cpu backend" in done.stderr
    assert "reference backend" not in done.stderr
