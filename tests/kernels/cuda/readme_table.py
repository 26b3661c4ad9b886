"""What nvcc makes of the kernels by hand: registers, spills, and the instructions that they were written for.

`python -m tests.kernels.cuda.readme_table` prints the table; with --write it goes into kernels/README.md. Needs no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "kernels/README.md"
BEGIN, END = "<!-- cuda table -->\n", "<!-- end of cuda table -->\n"
COUNTED = ("QGMMA", "HGMMA", "UTMALDG", "UTMASTG", "LDL", "STL")
PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def nvdisasm() -> str | None:
    """The toolkit's, or the one that comes with Triton."""
    spec = find_spec("triton")
    places = [str(Path(folder) / "backends/nvidia/bin") for folder in (spec and spec.submodule_search_locations) or []]
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=":".join(places))


def missing() -> str:
    """Which tool the table lacks here, if so."""
    tools = {"nvcc": shutil.which("nvcc"), "nvdisasm": nvdisasm(), "c++filt": shutil.which("c++filt")}
    return ", ".join(f"there is no {name}" for name, path in tools.items() if path is None)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def release() -> str:
    match = re.search(r"release ([\d.]+)", run("nvcc", "--version"))
    assert match
    return match[1]


def short(name: str) -> str:
    """A kernel's name without its parameters and namespace; of an enumerator, the type and the number."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").replace("grok::cuda::", "")
    return re.sub(r"\((?:\w+::)*(\w+)\)(\d)", r"\1 \2", name[: name.rindex("(")])


def kernels(source: Path) -> list[tuple[str, ...]]:
    """A row for every kernel of a source: name, registers, bytes spilled, and how often each instruction of COUNTED."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        arch = "-gencode=arch=compute_90a,code=sm_90a"
        said = run(
            "nvcc", "-std=c++17", "-O3", arch, "-Xptxas", "-v", "-cubin", "-I", ROOT / "csrc", source, "-o", cubin
        )
        code = run(str(nvdisasm()), "-c", cubin)
    bodies = re.split(r"^\s*\.section\s+\.text\.(\w+).*$", code, flags=re.MULTILINE)
    text = dict(zip(bodies[1::2], bodies[2::2], strict=True))
    rows = []
    for symbol, stores, loads, registers in PTXAS.findall(said):
        name = short(run("c++filt", symbol).strip())
        counts = [str(len(re.findall(rf"\b{word}\b", text[symbol]))) for word in COUNTED]
        rows.append((name, registers, str(int(stores) + int(loads)), *counts))
    return sorted(rows)


def table() -> str:
    sources = sorted((ROOT / "csrc/cuda").glob("*/instantiations/*.cu"))
    head = ("kernel", "registers", "spilled bytes", *(f"`{word}`" for word in COUNTED))
    rows = [(f"`{row[0]}`", *row[1:]) for source in sources for row in kernels(source)]
    lines = [head, ("---",) * len(head), *rows]
    return f"nvcc {release()}, sm_90a:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def written() -> str:
    """The table that kernels/README.md has."""
    return README.read_text().split(BEGIN)[1].split(END)[0].strip("\n") + "\n"


def write(text: str) -> None:
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"no table: {reason}")
    made = table()
    write(made) if "--write" in sys.argv[1:] else print(made, end="")
