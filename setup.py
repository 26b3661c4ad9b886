"""Builds the optional extensions: `grok_kernels._C` and, where torch has CUDA, `grok_kernels._CUDA` for Hopper.

Without a compiler, or without torch at build time, the package installs all the same and runs on its kernels in plain
torch; what was missing is said once. GROK_BUILD_NATIVE=0 leaves the extensions out on purpose. The sources of the CUDA
kernels are packaged too: `grok_kernels/cuda.py` can compile them later. The package's metadata is in pyproject.toml.

GROK_WHEEL=1 (`make wheel`) builds for machines without a compiler: a module that cannot be built is an error. Since the
ABI of torch holds within a minor version, the wheel requires the minor it was built against, and carries it in its name
(0.1.0+torch2.13) and in `grok_kernels/wheel_torch.txt`, which importing grok_kernels compares with the torch that runs.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, setup
from setuptools.command.build_py import build_py

NAME, CUDA_NAME = "grok_kernels._C", "grok_kernels._CUDA"
# thread_pool.cpp is for programs without torch: the module runs on torch's threads
SOURCES = sorted(
    str(path)
    for pattern in ("bindings/*.cpp", "cpu/**/*.cpp")
    for path in Path("csrc").glob(pattern)
    if "example" not in path.parts and path.name != "thread_pool.cpp"
)
# -ffp-contract=off: a fused multiply-add on one instruction set only would give it bits of its own.
# CFLAGS may name another level of optimisation, as the build with sanitizers does.
LEVEL = [] if re.search(r"(^|\s)-O\S", os.environ.get("CFLAGS", "")) else ["-O3"]
FLAGS = [*LEVEL, "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
CUDA_SOURCES = [
    str(path)
    for pattern in ("bindings/cuda/*.cpp", "cuda/*/instantiations/*.cu")
    for path in sorted(Path("csrc").glob(pattern))
]
CUDA_FLAGS = ["-O3", "-gencode=arch=compute_90a,code=sm_90a"]
WHEEL = os.environ.get("GROK_WHEEL") == "1"
if sys.platform == "linux":
    FLAGS += ["-include", str(Path("csrc/common/glibc_2_28.h").resolve())]


def torch_minor() -> str:
    """As in 2.13."""
    import torch

    return ".".join(torch.__version__.split(".")[:2])


class Pinned(Distribution):
    """The distribution of a wheel: it requires the minor of torch that its module is built against."""

    def parse_config_files(self, *args: Any, **options: Any) -> None:
        super().parse_config_files(*args, **options)
        self.metadata.version += f"+torch{torch_minor()}"
        pinned = [f"torch=={torch_minor()}.*" if r.startswith("torch") else r for r in self.install_requires]
        self.install_requires = self.metadata.install_requires = pinned


class WithCudaSources(build_py):
    """Puts what the just-in-time build needs beside the modules that start it, and into a wheel the minor of torch."""

    def run(self) -> None:
        super().run()
        if WHEEL:
            Path(self.build_lib, "grok_kernels/wheel_torch.txt").write_text(torch_minor(), encoding="utf-8")
        if self.editable_mode:
            return
        for folder in ("common", "cuda", "bindings/cuda"):
            target = Path(self.build_lib, "grok_kernels/csrc", folder)
            unused = shutil.ignore_patterns("host_emulation", "example")
            shutil.copytree(Path("csrc", folder), target, ignore=unused, dirs_exist_ok=True)


def say(name: str, reason: str) -> None:
    instead = (
        "the kernels in plain torch serve instead (slower)" if name == NAME else "Triton's serve on Hopper instead"
    )
    print(
        f"grok-engine: going without native kernels, {name} was not built: {reason}\n"
        f"grok-engine: {instead}. To build them later, "
        "run `python setup.py build_ext --inplace` in the sources, or install again.",
        file=sys.stderr,
        flush=True,
    )


def missing_compiler() -> str:
    compiler = os.environ.get("CXX") or "c++"
    if os.name == "nt" or shutil.which((shlex.split(compiler) or [""])[0]):
        return ""
    return f"no C++ compiler, {compiler!r} is not there (CXX names another)"


def cuda_extension() -> tuple[Extension, str]:
    """The extension for Hopper, and why it cannot be built."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = runpy.run_path("kernels/grok_kernels/cuda_home.py")["cuda_home"](cpp_extension.CUDA_HOME)
    if cpp_extension.CUDA_HOME is None:
        return Extension(CUDA_NAME, CUDA_SOURCES), "no nvcc is found (CUDA_HOME names its place)"
    extension = cpp_extension.CUDAExtension(
        CUDA_NAME,
        CUDA_SOURCES,
        include_dirs=[str(Path("csrc").resolve())],
        depends=[str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern)],
        extra_compile_args={"cxx": ["-O3", "-g0"], "nvcc": CUDA_FLAGS},
    )
    return extension, missing_compiler()


def native() -> dict[str, Any]:
    """setup()'s arguments for the extension. Its command says what is missing, since this file is read many times."""
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch raises more than ImportError
        from setuptools.command.build_ext import build_ext as base

        extensions = [Extension(NAME, SOURCES)]
        impossible = {NAME: f"torch cannot be imported at build time ({type(error).__name__}: {error})"}
    else:
        base = cpp_extension.BuildExtension
        impossible = {NAME: missing_compiler()}
        extension = cpp_extension.CppExtension(
            NAME,
            SOURCES,
            include_dirs=[str(Path("csrc").resolve())],
            depends=[str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").rglob(pattern)],
            # No -fopenmp at the link: the runtime must be the one torch has loaded, another has threads of its own.
            extra_compile_args=[*FLAGS, *(["-fopenmp"] if sys.platform == "linux" else [])],
        )
        extensions = [extension]
        if torch.version.cuda is not None and not WHEEL:
            extension, impossible[CUDA_NAME] = cuda_extension()
            extensions.append(extension)

    class BuildOptional(base):  # type: ignore[misc,valid-type]
        def run(self) -> None:
            self.in_sources = bool(self.inplace)  # setuptools clears it while it builds
            super().run()

        def build_extensions(self) -> None:
            self.extensions = [extension for extension in self.extensions if self.build_or_say(extension)]

        def build_or_say(self, extension: Extension) -> bool:
            reason = impossible[extension.name]
            if not reason:
                try:
                    self.extensions = [extension]
                    super().build_extensions()
                    return True
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
            if WHEEL:
                raise SystemExit(f"grok-engine: no wheel, {extension.name} was not built: {reason}")
            say(extension.name, reason)
            path = Path(self.get_ext_fullpath(extension.name))
            path.unlink(missing_ok=True)  # a module left from an earlier build must not pass for this one
            if self.in_sources:
                Path("kernels/grok_kernels", path.name).unlink(missing_ok=True)
            return False

    commands = {"build_ext": BuildOptional, "build_py": WithCudaSources}
    return {"ext_modules": extensions, "cmdclass": commands, "distclass": Pinned if WHEEL else Distribution}


setup(**({"cmdclass": {"build_py": WithCudaSources}} if os.environ.get("GROK_BUILD_NATIVE") == "0" else native()))
