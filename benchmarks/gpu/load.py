"""Print the machine; take the native modules from a bundle, or build them here. Status 1 if one does not load."""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from . import ROOT, bundle
from .run import SKIPPED

PACKAGE = ROOT / "kernels/grok_kernels"
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
SOURCES = {  # what each module is built from
    "_C": ("bindings/*.*", "cpu/**/*.*", "common/*.*"),
    "_CUDA": ("bindings/cuda/*.*", "cuda/*.cuh", "cuda/[!h]*/**/*.*", "common/*.*"),
}
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "c++", "ninja")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.load", description=__doc__)
    parser.add_argument("--bundle", type=Path, help="what `python -m benchmarks.gpu.bundle` made")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, and so without the module for one")
    a = parser.parse_args()
    if not a.rehearse and not torch.cuda.is_available():
        print("there is no GPU")
        return SKIPPED
    _about()
    modules = ("_C",) if a.rehearse else ("_C", "_CUDA")
    if a.bundle:
        print(f"bundle     {bundle.unpack(a.bundle, PACKAGE, SUFFIX) or 'taken'}")
    if any(_old(name) for name in modules):
        print(f"building   {', '.join(name for name in modules if _old(name))}", flush=True)
        command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"]
        if subprocess.run(command, cwd=ROOT).returncode:  # an older module must not pass for this build
            print("NOT BUILT: setup.py failed")
            return 1
    return 1 if _missing(modules, a.rehearse) else 0


def _about() -> None:
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], timeout=30)
    print(f"{'python':18} {sys.version.split()[0]}, torch {torch.__version__}")
    for tool in TOOLS:
        print(f"{tool:18} {shutil.which(tool) or 'not on the path'}", flush=True)


def _old(name: str) -> bool:
    """Whether the module is missing for this interpreter, or older than its sources."""
    module = PACKAGE / f"{name}{SUFFIX}"
    files = [path for pattern in SOURCES[name] for path in (ROOT / "csrc").glob(pattern)]
    newest = max(path.stat().st_mtime for path in files)
    return not module.is_file() or module.stat().st_mtime < newest


def _missing(modules: tuple[str, ...], rehearse: bool) -> int:
    """Import them, ask the registry which ops each backend serves, and return the number of faults."""
    faults = 0
    for name in modules:
        try:
            importlib.import_module(f"grok_kernels.{name}")
            print(f"{name:18} loads")
        except ImportError as error:  # noqa: PERF203
            print(f"{name:18} DOES NOT LOAD: {error}")
            faults += 1
    import grok_kernels

    for backend in ("cpu",) if rehearse else ("triton", "cuda"):
        status = {op: s[backend] for op, s in grok_kernels.backends().items() if backend in s}
        served = [op for op, s in status.items() if s.available]
        print(f"{backend:18} {', '.join(served) or 'NO OP'}")
        for reason in sorted({s.reason for s in status.values() if not s.available}):
            print(f"{'':18} {reason}")
        faults += not served
    print("all modules load" if not faults else f"{faults} of the modules and backends are not there")
    return faults


if __name__ == "__main__":
    sys.exit(main())
