"""Build beforehand for a machine with a GPU: python -m benchmarks.gpu.bundle FOLDER [--python FILE].

FOLDER gets the native modules for the interpreter FILE (its Python, torch and CUDA must be the other machine's) and a
cache of Triton's kernels at Grok-1's sizes, compiled for an H100. `python3 -m benchmarks.gpu first --bundle FOLDER`
takes from it what fits the machine and the checkout there, says why it takes nothing else, and builds the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import PATHS, ROOT

ABOUT = "about.json"
ASK = """
import json, sysconfig, torch
from triton.runtime.cache import triton_key
suffix = sysconfig.get_config_var("EXT_SUFFIX")
print(json.dumps({"suffix": suffix, "torch": torch.__version__, "triton": triton_key()}))
"""
KEPT = (".json", ".cubin")  # the files of a compiled kernel that Triton needs to launch it


def sources() -> str:
    """A digest of the native modules' sources."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"]):
        if path.is_file() and path.suffix != ".md":
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def commit() -> str | None:
    """The checkout's commit, with + if it has changes."""
    git = ("git", "-C", str(ROOT))
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def make(folder: Path, python: str) -> None:
    """Write the bundle. ChildProcessError with the compiler's output where a module does not build."""
    folder.mkdir(parents=True, exist_ok=True)
    about = json.loads(subprocess.run([python, "-c", ASK], check=True, capture_output=True, text=True).stdout)
    objects = folder.with_name(f"{folder.name}-objects").resolve()  # kept, so that builds are incremental
    built = objects / "modules"
    shutil.rmtree(built, ignore_errors=True)  # an older module must not pass for this build
    command = [python, "-W", "ignore", "setup.py", "-q", "build_ext", "--build-lib", str(built)]
    done = subprocess.run([*command, "--build-temp", str(objects)], cwd=ROOT, capture_output=True, text=True)
    for name in ("_C", "_CUDA"):
        file = built / f"grok_kernels/{name}{about['suffix']}"
        if not file.is_file():
            raise ChildProcessError(f"{name} was not built:\n{(done.stdout + done.stderr)[-4000:]}")
        shutil.copy(file, folder)
    cache = folder / "triton"
    shutil.rmtree(cache, ignore_errors=True)
    with tempfile.TemporaryDirectory() as made:
        env = {**os.environ, "TRITON_CACHE_DIR": made, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(PATHS)}
        specimens = [python, "-m", "tests.kernels.triton_specimens"]
        subprocess.run(specimens, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        for path in Path(made).glob("*/*"):
            if path.suffix in KEPT:
                (cache / path.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / path.parent.name)
    (folder / ABOUT).write_text(json.dumps({**about, "sources": sources(), "commit": commit()}, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    return found


def unpack(folder: Path, package: Path, suffix: str) -> str:
    """Put the modules into `package` and the kernels into TRITON_CACHE_DIR; return what was not taken, and why."""
    import torch

    about, refused = read(folder), []
    if about["suffix"] != suffix or about["torch"] != torch.__version__:
        refused.append(
            f"modules are for {about['suffix']} and torch {about['torch']}, not {suffix} and {torch.__version__}"
        )
    elif about["sources"] != sources():
        refused.append("modules are of other sources than these")
    else:
        for name in ("_C", "_CUDA"):
            shutil.copy(folder / f"{name}{suffix}", package)
    try:
        from triton.runtime.cache import triton_key

        key = triton_key()
    except ImportError as error:
        key = str(error)
    if about["triton"] != key:
        refused.append(f"kernels are of another Triton, not of {key}")
    elif "TRITON_CACHE_DIR" in os.environ:
        _fill(folder / "triton", Path(os.environ["TRITON_CACHE_DIR"]))
    return "; ".join(refused)


def _fill(packed: Path, cache: Path) -> None:
    """Copy the kernels; the lists of a kernel's files hold absolute paths, which are rewritten."""
    for source in packed.glob("*/*"):
        target = cache / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name.startswith("__grp__"):
            names = json.loads(source.read_text())["child_paths"]
            there = {name: str(target.parent / name) for name in names if (source.parent / name).is_file()}
            target.write_text(json.dumps({"child_paths": there}))
        else:
            shutil.copy(source, target)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bundle", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=sys.executable, help="of the same versions as on the machine with the GPU")
    a = parser.parse_args()
    make(a.folder, a.python)
    size = sum(path.stat().st_size for path in a.folder.rglob("*") if path.is_file())
    print(f"{a.folder}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
