"""csrc/cpu on every instruction set, without torch: isa_checks.cpp on this machine, and on 64-bit Arm under qemu-user.

On Debian: `apt-get install g++-aarch64-linux-gnu qemu-user`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
ARM = "aarch64-linux-gnu-"
# as setup.py compiles the module
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
MISSING = [name for name in (f"{ARM}g++", f"{ARM}objdump", "qemu-aarch64", "c++") if shutil.which(name) is None]
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
pytestmark = [
    pytest.mark.skipif("GROK_TEST_MORE" not in os.environ, reason="minutes: `make arm` runs it"),
    pytest.mark.skipif(bool(MISSING), reason=f"there is no {', '.join(MISSING)}"),
]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def build(compiler: str, *flags: str, into: Path) -> Path:
    """Compiles csrc/cpu and links it into two programs, `checks` and `example`."""
    into.mkdir()
    sources = [*sorted((CSRC / "cpu").rglob("*.cpp")), HERE / "isa_checks.cpp"]

    def compiled(source: Path) -> Path:
        target = into / f"{'_'.join(source.relative_to(HERE.parents[1]).with_suffix('').parts)}.o"
        done = run(compiler, *FLAGS, *flags, "-I", CSRC, "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        *kernels, checks = pool.map(compiled, sources)
    example = next(path for path in kernels if "example" in path.name)
    kernels.remove(example)
    for name, main in (("checks", checks), ("example", example)):
        done = run(compiler, "-static", "-pthread", *kernels, main, "-o", into / name)
        assert done.returncode == 0, done.stderr
    return into


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(f"{ARM}g++", "-O3", into=tmp_path_factory.mktemp("arm") / "build")


def test_portable_has_the_same_bits_on_both_architectures(arm: Path, tmp_path: Path) -> None:
    """And each program finds its own instruction sets right: see the head of isa_checks.cpp."""
    emulated = () if "avx512_bf16" in CPUINFO.split() else ("-DGROK_EMULATE_AVX512",)
    native = build("c++", "-O1", *emulated, into=tmp_path / "build")
    digests = []
    for command in ([native / "checks"], ["qemu-aarch64", "-cpu", "max", arm / "checks"]):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        digests.append([line for line in done.stdout.splitlines() if re.match(r"portable \w+ [0-9a-f]{16}$", line)])
    assert len(digests[0]) == 9
    assert digests[0] == digests[1]
    for isa in ("neon_bf16", "neon", "portable"):
        assert f"\n{isa}: " in done.stdout


def test_the_cpu_decides_the_instruction_set(arm: Path) -> None:
    old, new = (["qemu-aarch64", "-cpu", cpu, arm / "example"] for cpu in ("cortex-a76", "max"))
    assert run(*old).stdout.startswith("neon: ")
    assert run(*new).stdout.startswith("neon_bf16: ")
    done = run(*old, GROK_CPU_ISA="neon_bf16")
    assert done.returncode == 1
    assert "GROK_CPU_ISA='neon_bf16' cannot run on this machine, which has neon, portable" in done.stderr


def innermost_loops(function: str) -> list[str]:
    """The instructions of each loop that holds no other, as objdump prints them."""
    lines = [line for line in function.split("\n") if re.match(r"\s*[0-9a-f]+:\t", line)]
    at = {int(line.split(":")[0], 16): i for i, line in enumerate(lines)}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"\t(?:b|b\.\w+|cbn?z|tbn?z)\t(?:.*, )?([0-9a-f]+) <", line)
        if jump and at.get(int(jump[1], 16), i + 1) <= i:
            loops.append((at[int(jump[1], 16)], i))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    return ["\n".join(lines[a : b + 1]) for a, b in inner]


@pytest.mark.parametrize(
    ("source", "function", "instruction", "most"),
    [
        ("block_neon", r"tile<6, __Float32x4_t>", "bfmmla", 50),
        ("block_neon", r"tile<6, __Int32x4_t>", "smmla", 50),
        ("block_f32", r"neon::tile<6>", "fmla", 44),
    ],
)
def test_the_inner_loops_hold_their_sums_in_registers(
    arm: Path, source: str, function: str, instruction: str, most: int
) -> None:
    """24 sums of a tile of 6 rows: a loop of `most` instructions is bound by its multiplications on four vector pipes
    and eight instructions a cycle."""
    text = run(f"{ARM}objdump", "-dC", "--no-show-raw-insn", arm / f"csrc_cpu_gemm_{source}.o").stdout
    bodies = [f for f in re.split(r"\n(?=[0-9a-f]+ <)", text) if re.search(function, f.split("\n", 1)[0])]
    loops = [loop for body in bodies for loop in innermost_loops(body) if f"\t{instruction}\t" in loop]
    loops = [loop for loop in loops if loop.count(f"\t{instruction}\t") == 24]
    assert len(loops) == 1
    assert loops[0].count("\n") + 1 <= most
    assert not re.search(r"\tst[pru]", loops[0])
