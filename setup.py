"""Builds the optional extension `grok_kernels._C`. What is declared, not built, is in pyproject.toml.

Without a compiler, or without torch at build time, the package installs all the same and runs on its kernels in plain
torch; what was missing is said once. GROK_BUILD_NATIVE=0 leaves the extension out on purpose.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

NAME = "grok_kernels._C"
SOURCES = sorted(str(path) for folder in ("bindings", "cpu") for path in Path("csrc", folder).glob("*.cpp"))
# -ffp-contract=off: a fused multiply-add on one instruction set only would give it bits of its own
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall"]


def say(reason: str) -> None:
    print(
        f"grok-engine: going without native kernels, {NAME} was not built: {reason}\n"
        "grok-engine: the kernels in plain torch serve instead (slower). To build them later, "
        "run `python setup.py build_ext --inplace` in the sources, or install again.",
        file=sys.stderr,
        flush=True,
    )


def missing_compiler() -> str:
    compiler = os.environ.get("CXX") or "c++"
    if os.name == "nt" or shutil.which((shlex.split(compiler) or [""])[0]):
        return ""
    return f"no C++ compiler, {compiler!r} is not there (CXX names another)"


def native() -> dict[str, Any]:
    """setup()'s arguments for the extension. Its command says what is missing, since this file is read many times."""
    try:
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch raises more than ImportError
        from setuptools.command.build_ext import build_ext as base

        impossible = f"torch cannot be imported at build time ({type(error).__name__}: {error})"
        extension = Extension(NAME, SOURCES)
    else:
        base = cpp_extension.BuildExtension
        impossible = missing_compiler()
        extension = cpp_extension.CppExtension(
            NAME,
            SOURCES,
            include_dirs=[str(Path("csrc").resolve())],
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
            # No -fopenmp at the link: the runtime must be the one torch has loaded, another has threads of its own.
            extra_compile_args=[*FLAGS, *(["-fopenmp"] if sys.platform == "linux" else [])],
        )

    class BuildOptional(base):  # type: ignore[misc,valid-type]
        def run(self) -> None:
            self.in_sources = bool(self.inplace)  # setuptools clears it while it builds
            super().run()

        def build_extensions(self) -> None:
            built = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
            reason = impossible
            if not reason:
                try:
                    super().build_extensions()
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
            if reason:
                say(reason)
                self.extensions = []
                for path in built:  # a module left from an earlier build must not pass for this one
                    path.unlink(missing_ok=True)
                    if self.in_sources:
                        Path("kernels/grok_kernels", path.name).unlink(missing_ok=True)

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildOptional}}


setup(**({} if os.environ.get("GROK_BUILD_NATIVE") == "0" else native()))
