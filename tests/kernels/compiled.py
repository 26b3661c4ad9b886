"""What Triton's compiler made of a launch, for a chip that need not be there: registers, spills, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs

from grok_kernels.chips import Chip
from grok_kernels.triton.cross_compile import compile_launch, target
from grok_kernels.triton.launch import Launch

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
    # neighbours along K that a thread holds of an operand in registers; 2 of 16 bits are K in order
    k_widths: tuple[int, ...] = ()


def compiles(launches: Iterable[Launch], chip: Chip) -> set[tuple[str, str]]:
    """The kernels that Triton would compile for these launches on the chip: name and Triton's key. Compiles nothing."""
    found: set[tuple[str, str]] = set()

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        found.add((fn.name, str(key)))
        return True  # skips the compiler

    with target(chip), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        for launch in launches:
            launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.meta)
    return found


def inspect(launch: Launch, chip: Chip) -> Compiled:
    """This launch's kernel, compiled for the chip."""
    kernel = compile_launch(launch, chip)
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
