"""The kernels compiled for a chip that need not be there, and what came out: registers, spills, instructions.

An op is called with tensors on `meta` under `launch.recording`, and each launch goes through Triton's own
specialisation and compiler, as it would on the chip. Not under TRITON_INTERPRET=1, where kernels are not compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ..chips import Chip, assume_chip
from .launch import Launch, recording

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one chip. Counts are of instructions in the code, not of those executed."""

    name: str
    chip: str
    registers: int  # a thread
    spills: int  # loads and stores of a thread's local memory
    shared_bytes: int
    instructions: dict[str, int]  # SASS by opcode up to the first dot; of AMD chips, the first word of a line
    ptx: str
    k_widths: tuple[
        int, ...
    ] = ()  # neighbours along K that a thread has of an operand in registers; 2 of 16 bits are K in order


class _Absent:
    """A driver of a chip that is not there: enough of one for Triton to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target.arch)

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def _driven(chip: Chip) -> Iterator[None]:
    """Inside the block Triton compiles for this chip."""
    target = GPUTarget("cuda", chip.capability, 32) if chip.capability else GPUTarget("hip", chip.arch, 64)
    before, driver._active = driver._active, _Absent(target)
    try:
        yield
    finally:
        driver._active = before


def launches(call: Callable[[], Any], chip: Chip) -> list[Launch]:
    """What `call` would start on this chip. Its tensors are on `meta`."""
    with assume_chip(chip), recording() as found:
        call()
    return found


def compiles(launches: Iterable[Launch], chip: Chip) -> set[tuple[str, str]]:
    """What of these launches Triton compiles on the chip, a kernel's name and Triton's key each. Compiles nothing."""
    found: set[tuple[str, str]] = set()

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        found.add((fn.name, str(key)))
        return True  # in place of compiling

    with _driven(chip), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        for launch in launches:
            launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.meta)
    return found


def compile_only(launch: Launch, chip: Chip) -> Any:
    """This launch's kernel as Triton has it, compiled for the chip into Triton's cache or found there."""
    with _driven(chip):
        return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.meta)


def compile_launch(launch: Launch, chip: Chip) -> Compiled:
    """This launch's kernel, compiled for the chip, and what came out."""
    kernel = compile_only(launch, chip)
    name = launch.kernel.__name__
    if not chip.capability:
        return _amd(name, chip, kernel)
    sass, usage = _disassembled(kernel.asm["cubin"])
    opcodes = Counter(m.group(1) for m in re.finditer(r"^\s*(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)[. ]", sass, re.M))
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    spills = opcodes["LDL"] + opcodes["STL"]
    widths = tuple(sorted({int(width) for width in re.findall(r"kWidth = (\d+)", kernel.asm["ttgir"])}))
    return Compiled(
        name, chip.name, registers, spills, kernel.metadata.shared, dict(opcodes), kernel.asm["ptx"], widths
    )


def _disassembled(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _output("nvdisasm", "-c", file.name)
        usage = _output("cuobjdump", "-res-usage", file.name)
    return re.sub(r"/\*.*?\*/", "", sass), usage


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _amd(name: str, chip: Chip, kernel: Any) -> Compiled:
    text = kernel.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])  # type: ignore[index]

    opcodes = Counter(m.group(1) for m in re.finditer(r"^\s+([a-z]\w+)", text, re.M))
    return Compiled(
        name, chip.name, number("vgpr_count"), number("vgpr_spill_count"), kernel.metadata.shared, dict(opcodes), ""
    )
