"""csrc/cpu without torch: it compiles without a warning, links with its types compared, and its example gives the
result of a plain loop."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = shlex.split(os.environ.get("CXX") or "c++")
WARNINGS = ["-std=c++17", "-O1", "-flto", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
LINK = [*CXX, "-O1", "-flto=auto", "-Wodr", "-Werror", "-pthread"]
pytestmark = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"there is no {CXX[0]}")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # `make sanitize` sets it
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=False)


needs_gcc = pytest.mark.skipif(
    shutil.which(CXX[0]) is None or "Free Software Foundation" not in run(*CXX, "--version").stdout,
    reason="-Wodr is GCC's",
)


def compiled(source: Path, target: Path) -> Path:
    done = run(*CXX, *WARNINGS, "-I", CSRC, "-c", source, "-o", target)
    assert done.returncode == 0, done.stderr
    return target


def test_every_header_needs_nothing_before_it() -> None:
    headers = sorted((CSRC / "cpu").rglob("*.h"))
    assert CSRC / "cpu/include/grok/cpu.h" in headers
    options = ["-std=c++17", "-Wall", "-Werror", "-fsyntax-only", "-I", CSRC, "-x", "c++", "/dev/null", "-include"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda header: run(*CXX, *options, header), headers):
            assert done.returncode == 0, done.stderr


@needs_gcc
def test_the_example_agrees_with_a_plain_loop(tmp_path: Path) -> None:
    """Linked with -Wodr: two types of one name in two files are an error, which no compiler sees that has one file."""
    sources = sorted((CSRC / "cpu").rglob("*.cpp"))
    targets = [tmp_path / f"{i}.o" for i in range(len(sources))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources, targets))
    done = run(*LINK, *objects, "-o", tmp_path / "expert_layer")
    assert done.returncode == 0, done.stderr
    for isa in ("", "portable"):
        done = run(tmp_path / "expert_layer", GROK_CPU_ISA=isa)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the same bits on 4 threads and on 1" in done.stdout


@needs_gcc
def test_the_linker_sees_two_types_of_one_name(tmp_path: Path) -> None:
    objects = []
    for name, member in {"a": "int64_t first;", "b": "const void* first; int64_t count;"}.items():
        source = tmp_path / f"{name}.cpp"
        source.write_text(f"""#include "common/types.h"
namespace grok::cpu {{
struct Block {{ {member} }};
void use_{name}(Block& block) {{ block = Block{{}}; }}
}}
{"int main() {}" if name == "a" else ""}
""")
        objects.append(compiled(source, tmp_path / f"{name}.o"))
    done = run(*LINK, *objects, "-o", tmp_path / "program")
    assert done.returncode != 0
    assert "-Werror=odr" in done.stderr
    assert "Block" in done.stderr


def test_the_thread_pool_keeps_its_promises(tmp_path: Path) -> None:
    sources, program = (CSRC / "cpu/thread_pool.cpp", HERE / "thread_pool_checks.cpp"), tmp_path / "checks"
    command = [*CXX, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", CSRC, *sources]
    done = run(*command, "-fsanitize=thread", "-o", program)
    if "tsan" in done.stderr:  # a compiler without the thread sanitizer's library
        done = run(*command, "-o", program)
    assert done.returncode == 0, done.stderr
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
