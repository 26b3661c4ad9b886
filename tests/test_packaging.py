"""The distribution: what a wheel holds, and that the package installs and runs where the extension cannot be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
# An editable install finds what a package lacks in the project's own sources: not in this test.
USE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import torch, grok_kernels as g
g.rms_norm(torch.ones(2, 4), torch.ones(4))
g.rms_norm(torch.ones(2, 4), torch.ones(4))
print(g.__file__)
print(g.chosen()["rms_norm"])
print(g.backends()["rms_norm"]["cpu"])
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources as a fresh clone has them, without what was built."""
    tree = tmp_path / "sources"
    for folder in ("grok_engine", "kernels", "csrc", "benchmarks"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=SKIPPED)
    for pattern in ("setup.py", "pyproject.toml", "MANIFEST.in", "*.md", "LICENSE"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, tree)
    return tree


def run(tree: Path, *args: str, fails: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GROK_", "CXX", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, *args], cwd=tree, env={**kept, **env}, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def assert_reference_serves(folder: Path, reason: str) -> None:
    used = run(folder.parent, "-c", USE, PYTHONPATH=str(folder))
    file, chosen, status = used.stdout.splitlines()
    assert file.startswith(str(folder))
    assert chosen == "('reference',)"
    assert "available=False" in status
    assert reason in status
    assert used.stderr.count("no native CPU kernels") == 1


def test_wheel_holds_every_package_and_their_data(tree: Path) -> None:
    assets = tree / "grok_engine/assets/tiny"
    assets.mkdir(parents=True, exist_ok=True)
    tuned = tree / "kernels/grok_kernels/tuned"
    tuned.mkdir(exist_ok=True)
    for folder in (assets, tuned):
        (folder / "planted.json").write_text("{}")
    run(tree, "setup.py", "-q", "bdist_wheel", "-d", "dist", GROK_BUILD_NATIVE="0")
    (wheel,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "grok-engine = grok_engine.cli:main" in archive.read(entry_points).decode()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Dist: torch<2.14,>=2.11" in text
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in required if "triton" in line]  # torch's builds for GPUs bring it
    packages = {
        "grok_engine": "grok_engine",
        "grok_kernels": "kernels/grok_kernels",
        "grok_bench": "benchmarks/grok_bench",
    }
    for package, folder in packages.items():
        modules = {f"{package}/{p.relative_to(tree / folder).as_posix()}" for p in (tree / folder).rglob("*.py")}
        assert modules <= names, modules - names
        assert f"{package}/py.typed" in names
    assert {"grok_engine/assets/tiny/planted.json", "grok_engine/server/page.html"} <= names
    assert {"grok_kernels/_C.pyi", "grok_kernels/tuned/planted.json"} <= names
    # what compiles the CUDA kernels at their first use
    needed = ("bindings/cuda/route.cpp", "common/check.h", "cuda/launch.cuh", "cuda/route/instantiations/route.cu")
    assert {f"grok_kernels/csrc/{path}" for path in needed} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(packages)


def test_without_a_compiler_it_says_so_once_and_the_reference_serves(tree: Path) -> None:
    done = run(tree, "setup.py", "-q", "build_ext", "--inplace", CXX="/nonexistent/c++")
    assert done.stderr.count("going without native kernels") == 1
    assert "no C++ compiler, '/nonexistent/c++' is not there" in done.stderr
    assert_reference_serves(tree / "kernels", "was not built")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in compiler is a shell script")
def test_a_failed_build_removes_the_module_of_an_earlier_one(tree: Path) -> None:
    import sysconfig

    compiler = tree / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: planted' >&2\nexit 1\n")
    compiler.chmod(0o755)
    stale = tree / "kernels/grok_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_text("left over")
    done = run(tree, "setup.py", "-q", "build_ext", "--inplace", CXX=str(compiler))
    assert done.stderr.count("going without native kernels") == 1
    assert not stale.exists()


def test_without_torch_at_build_time_it_still_builds(tree: Path) -> None:
    (tree / "torch.py").write_text("raise ImportError('planted')\n")
    done = run(tree, "setup.py", "-q", "bdist_wheel", "-d", "dist", PYTHONPATH=str(tree))
    assert done.stderr.count("going without native kernels") == 1
    assert "torch cannot be imported at build time (ImportError: planted)" in done.stderr
    assert len(list((tree / "dist").glob("*.whl"))) == 1


def test_an_extension_that_does_not_load_is_the_reason(tree: Path) -> None:
    (tree / "kernels/grok_kernels/_C.py").write_text("raise ImportError('undefined symbol: planted')\n")
    assert_reference_serves(tree / "kernels", "does not load (undefined symbol: planted)")


def test_an_extension_of_another_torch_is_refused(tree: Path) -> None:
    (tree / "kernels/grok_kernels/_C.py").write_text("torch_version = '1.13.1'\n")
    assert_reference_serves(tree / "kernels", "was built against torch 1.13, this is torch")


def test_an_extension_of_another_checkout_is_refused(tree: Path) -> None:
    """As the finder of an editable installation gives it, where this checkout was not built."""
    text = "import torch\ntorch_version, __file__ = torch.__version__, '/elsewhere/grok_kernels/_C.so'\n"
    (tree / "kernels/grok_kernels/_C.py").write_text(text)
    own = (tree / "kernels/grok_kernels").resolve()
    assert_reference_serves(tree / "kernels", f"lies in /elsewhere/grok_kernels, this package in {own}: it is another")


def test_a_wheel_requires_the_minor_of_torch_it_is_built_against(tree: Path) -> None:
    run(tree, "setup.py", "-q", "egg_info", GROK_WHEEL="1")
    metadata = (tree / "grok_engine.egg-info/PKG-INFO").read_text()
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"Version: 0.1.0+torch{minor}\n" in metadata
    assert f"Requires-Dist: torch=={minor}.*\n" in metadata


def test_a_wheel_without_its_module_is_not_built(tree: Path) -> None:
    done = run(tree, "setup.py", "-q", "build_ext", fails=True, GROK_WHEEL="1", CXX="/nonexistent/c++")
    assert "no wheel, grok_kernels._C was not built: no C++ compiler, '/nonexistent/c++' is not there" in done.stderr


def test_a_wheel_for_another_torch_is_an_error_with_both_versions(tree: Path) -> None:
    package = tree / "kernels/grok_kernels"
    (package / "_C.py").write_text("raise SystemExit('loaded')\n")
    (package / "wheel_torch.txt").write_text("1.13")
    done = run(tree, "-c", "import grok_kernels", fails=True, PYTHONPATH=str(tree / "kernels"))
    error = f"this wheel of grok-engine is built for torch 1.13 and does not work with torch {torch.__version__}"
    assert f"ImportError: {error}" in done.stderr
    assert "install torch 1.13 (`pip install 'torch==1.13.*'`), or the wheel for torch" in done.stderr


def test_a_wheel_whose_module_does_not_load_is_an_error(tree: Path) -> None:
    package = tree / "kernels/grok_kernels"
    (package / "_C.py").write_text("raise ImportError('undefined symbol: planted')\n")
    (package / "wheel_torch.txt").write_text(".".join(torch.__version__.split(".")[:2]))
    done = run(tree, "-c", "import grok_kernels", fails=True, PYTHONPATH=str(tree / "kernels"))
    assert "ImportError: the extension grok_kernels._C does not load (undefined symbol: planted)" in done.stderr
