"""Who may import whom, read from the sources: imports at the top, inside functions and for types alike."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "grok_engine": "grok_engine",
    "grok_kernels": "kernels/grok_kernels",
    "grok_bench": "benchmarks/grok_bench",
}

# A module may import itself, what lies in the same package of this table, and what stands at its right. The longest
# name that fits decides; a module that no line fits is an error. "*" is the whole of that package.
ALLOWED: dict[str, tuple[str, ...]] = {
    # the engine, from its leaves up
    "grok_engine.config": (),
    "grok_engine.tokenizer": (),
    "grok_engine.checkpoint": ("config",),
    "grok_engine.runtime": (),
    "grok_engine.runtime.allocator": (),
    "grok_engine.runtime.scheduler": ("runtime.allocator",),
    "grok_engine.runtime.batch": (),
    "grok_engine.runtime.pages": ("config", "runtime.batch"),
    "grok_engine.runtime.text": ("sampling.params", "tokenizer"),
    "grok_engine.runtime.request": ("runtime.scheduler", "runtime.text", "sampling"),
    "grok_engine.runtime.graphs": ("config", "models", "runtime.batch", "grok_kernels"),
    "grok_engine.runtime.runner": (
        "config", "models", "runtime.batch", "runtime.graphs", "runtime.pages", "grok_kernels",
    ),
    "grok_engine.sampling": ("config", "tokenizer", "grok_kernels"),
    "grok_engine.layers": ("config", "runtime.batch", "grok_kernels"),
    "grok_engine.models": ("config", "layers", "runtime.batch"),
    "grok_engine.loading": ("checkpoint", "config", "layers", "models", "grok_kernels"),
    # where a checkpoint, a model and a runner are put together
    "grok_engine.engine": (
        "checkpoint", "config", "loading", "models", "runtime", "sampling", "tokenizer", "grok_kernels",
    ),
    "grok_engine.llm": ("config", "engine", "loading", "models", "runtime", "sampling", "tokenizer"),
    "grok_engine.async_llm": ("engine", "runtime.request", "sampling"),
    "grok_engine.tools": ("checkpoint", "config"),
    # grok_kernels to say which backends served; grok_bench for `bench`, inside a function: nothing else imports it
    "grok_engine.cli": ("*", "grok_kernels", "grok_bench"),
    "grok_engine.__main__": ("cli",),
    "grok_engine": ("*",),  # __init__ alone: the names for users
    # the kernels
    "grok_kernels.registry": (),
    "grok_kernels.memory": (),
    "grok_kernels.packing": ("memory", "registry"),
    "grok_kernels.checks": ("packing",),
    "grok_kernels.tuning": (),
    "grok_kernels.counters": (),
    "grok_kernels.tune": ("*",),  # a command over all of it
    "grok_kernels.ops": ("registry", "checks"),
    "grok_kernels.reference": ("registry", "checks", "packing"),
    "grok_kernels.triton": ("registry", "checks", "counters", "packing", "tuning"),
    "grok_kernels.recording": ("registry",),
    "grok_kernels.cpu": ("registry", "checks", "packing", "recording", "tuning", "_C"),
    "grok_kernels.cuda": ("registry", "checks", "counters", "packing", "tuning", "cuda_home", "_CUDA"),
    "grok_kernels.cuda_home": (),
    "grok_kernels": ("*",),
    # the benchmarks
    "grok_bench.schema": (),
    "grok_bench.environment": ("schema", "grok_kernels"),
    "grok_bench.spread": (),
    "grok_bench.engine": ("schema", "spread", "environment", "report", "grok_engine"),
    "grok_bench.report": ("schema", "spread"),
    "grok_bench.kernels": ("schema", "spread", "environment", "report", "grok_engine", "grok_kernels"),
    "grok_bench.cli": ("*",),
    "grok_bench": ("kernels.contestant",),  # the decorator, for users
}  # fmt: skip

# What a module must not import from outside; ours above.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "grok_engine": ("triton", "torch.ops", "tests", "benchmarks", "examples"),
    "grok_engine.config": ("torch",),
    "grok_engine.runtime.scheduler": ("torch",),
    "grok_engine.runtime.allocator": ("torch",),
    "grok_engine.models": ("io", "json", "mmap", "os", "pathlib", "pickle", "safetensors", "shutil", "tempfile"),
    "grok_kernels": ("tests", "benchmarks", "examples"),
}
ONLY_TORCH = ("grok_kernels.reference",)  # and the standard library
ONLY_IN = {"triton": "grok_kernels.triton"}
LAZY = {"grok_engine": "grok_bench"}  # imported inside functions alone

BACKENDS = ("reference", "cpu", "triton", "cuda")
# cpu and cuda are devices too, so a layer may say those
BACKEND_WORDS = ("use_backend", "reference", "triton", "GROK_KERNELS_BACKEND")
FILE_CALLS = ("open", "torch.load", "torch.save")

Found = tuple[str, int, str]  # module, line, what is wrong


@dataclass(frozen=True)
class Source:
    module: str
    path: Path
    tree: ast.Module
    is_package: bool


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def longest(name: str, table: dict[str, tuple[str, ...]]) -> str | None:
    return max((key for key in table if within(name, key)), key=len, default=None)


def sources(root: Path) -> list[Source]:
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            found.append(Source(module, path, ast.parse(path.read_text(), str(path)), is_package))
    return found


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def imports(source: Source, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of everything imported; of `from a import b` it is a.b where that is a module, else a."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = source.module.split(".")
                parts = parts[: len(parts) - node.level + (1 if source.is_package else 0)]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                ours = base.split(".")[0] in PACKAGES
                yield node.lineno, name if name in modules or not ours or alias.name == "_C" else base
        elif isinstance(node, ast.Call) and dotted(node.func, {}).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            constant = isinstance(first, ast.Constant) and isinstance(first.value, str)
            yield node.lineno, str(first.value) if constant else "?"  # type: ignore[union-attr]


def arrow_errors(source: Source, modules: set[str]) -> Iterator[Found]:
    module, package = source.module, source.module.split(".")[0]
    key = longest(module, ALLOWED)
    if key is None or (key == package and module != package):
        yield module, 1, "has no line in the table of allowed imports"
        return
    allowed = [a if a in PACKAGES else package if a == "*" else f"{package}.{a}" for a in ALLOWED[key]]
    for line, name in imports(source, modules):
        if name == "?":
            yield module, line, "imports a computed name, which no reader and no test can follow"
        elif name.split(".")[0] in PACKAGES:
            target = longest(name, ALLOWED)
            if target != key and not any(within(name, a) for a in allowed):
                yield module, line, f"imports {name}"
        else:
            top = name.split(".")[0]
            for prefix, names in FORBIDDEN.items():
                if within(module, prefix) and any(within(name, n) for n in names):
                    yield module, line, f"imports {name}"
            if top in ONLY_IN and not within(module, ONLY_IN[top]) and not within(module, "grok_engine"):
                yield module, line, f"imports {name}"
            if any(within(module, p) for p in ONLY_TORCH) and top != "torch" and top not in sys.stdlib_module_names:
                yield module, line, f"imports {name}"


def body_errors(source: Source) -> Iterator[Found]:
    module = source.module
    named = [a for node in ast.walk(source.tree) if isinstance(node, ast.Import) for a in node.names]
    aliases = {alias.asname: alias.name for alias in named if alias.asname}
    for node in ast.walk(source.tree):
        line = getattr(node, "lineno", 1)
        if within(module, "grok_engine") and isinstance(node, ast.Attribute) and dotted(node, aliases) == "torch.ops":
            yield module, line, "mentions torch.ops"
        if (
            within(module, "grok_engine.models")
            and isinstance(node, ast.Call)
            and dotted(node.func, aliases) in FILE_CALLS
        ):
            yield module, line, f"calls {dotted(node.func, aliases)}"
        if within(module, "grok_engine.layers"):
            words = []
            if isinstance(node, ast.Attribute):
                words = [node.attr] if dotted(node, aliases).startswith("grok_kernels.") else []
                words = [w for w in words if w in (*BACKENDS, *BACKEND_WORDS)]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grok_kernels"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                words = [w for w in names if w in (*BACKENDS, *BACKEND_WORDS)]
            elif isinstance(node, ast.Import):
                words = [w for a in node.names if within(a.name, "grok_kernels") for w in a.name.split(".")]
                words = [w for w in words if w in BACKENDS]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = [node.value] if node.value in BACKEND_WORDS else []
            for word in words:
                yield module, line, f"names a backend ({word})"


def lazy_errors(source: Source, modules: set[str]) -> Iterator[Found]:
    package = source.module.split(".")[0]
    inside = {id(n) for f in ast.walk(source.tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    statements = [n for n in ast.walk(source.tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    at_top: list[ast.stmt] = [n for n in statements if id(n) not in inside]
    for line, name in imports(replace(source, tree=ast.Module(at_top, [])), modules):
        if package in LAZY and within(name, LAZY[package]):
            yield source.module, line, f"imports {name} outside of a function"


def include_errors(root: Path) -> Iterator[Found]:
    csrc = root / "csrc"
    for path in sorted(csrc.rglob("*")):
        folder = path.relative_to(csrc).parts[0]
        if folder not in ("common", "cpu", "cuda") or path.suffix not in (".h", ".cuh", ".cpp", ".cu", ".inl"):
            continue
        for line, text in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r"""\s*#\s*include\s*(["<])([^">]+)[">]""", text)
            if not match:
                continue
            kind, name = match.groups()
            name_of = path.relative_to(root).as_posix()
            if kind == "<":
                if name.split("/")[0] in ("torch", "ATen", "c10", "caffe2", "pybind11", "Python.h"):
                    yield name_of, line, f"includes {name}, which bindings/ alone may know"
                continue
            here = (path.parent / name).resolve()
            target = here if here.exists() else (csrc / name).resolve()
            if not any(target.is_relative_to((csrc / own).resolve()) for own in ("common", folder)):
                yield name_of, line, f"includes {name}, neither in common/ nor in {folder}/"


def violations(root: Path) -> list[str]:
    found: list[Found] = []
    read = sources(root)
    modules = {source.module for source in read}
    for source in read:
        found += arrow_errors(source, modules)
        found += body_errors(source)
        found += lazy_errors(source, modules)
    found += include_errors(root)
    return [f"{module}:{line} {what}" for module, line, what in sorted(set(found))]


def test_the_sources_keep_to_the_table() -> None:
    assert {source.module for source in sources(ROOT)} >= {"grok_engine.config", "grok_kernels.ops"}
    assert not violations(ROOT), "\n" + "\n".join(violations(ROOT))


PLANTED = [
    ("grok_engine/config.py", "import grok_engine.tools.plan", "imports grok_engine.tools.plan"),
    ("grok_engine/config.py", "def f():\n    import torch", "imports torch"),
    (
        "grok_engine/sampling/params.py",
        "def f():\n    from grok_engine.models import decoder",
        "imports grok_engine.models",
    ),
    ("grok_engine/runtime/scheduler.py", "from torch import Tensor", "imports torch.Tensor"),
    ("grok_engine/runtime/scheduler.py", "from . import pages", "imports grok_engine.runtime.pages"),
    ("grok_engine/runtime/allocator.py", "import torch.nn", "imports torch.nn"),
    ("grok_engine/runtime/allocator.py", "from . import pages", "imports grok_engine.runtime.pages"),
    ("grok_engine/runtime/runner.py", "import triton.language as tl", "imports triton.language"),
    ("grok_engine/runtime/runner.py", "import torch as t\ny = t.ops.grok.rms_norm", "mentions torch.ops"),
    ("grok_engine/runtime/runner.py", "from torch import ops", "imports torch.ops"),
    ("grok_engine/runtime/runner.py", "from .. import engine", "imports grok_engine.engine"),
    ("grok_engine/models/decoder.py", "from pathlib import Path", "imports pathlib.Path"),
    ("grok_engine/models/decoder.py", "def f(p):\n    return open(p)", "calls open"),
    ("grok_engine/models/decoder.py", "import grok_kernels", "imports grok_kernels"),
    ("grok_engine/layers/moe.py", "from ..models import decoder", "imports grok_engine.models.decoder"),
    ("grok_engine/layers/moe.py", "import grok_kernels as k\nk.use_backend", "names a backend (use_backend)"),
    ("grok_engine/layers/moe.py", "import grok_kernels\ngrok_kernels.use_backend('cpu')", "names a backend"),
    ("grok_engine/layers/moe.py", "from grok_kernels import triton", "names a backend (triton)"),
    ("grok_engine/layers/moe.py", "def f(backend='triton'): ...", "names a backend (triton)"),
    ("grok_engine/checkpoint/xai/reader.py", "from grok_engine.layers import moe", "imports grok_engine.layers.moe"),
    (
        "grok_engine/checkpoint/xai/reader.py",
        "import importlib\nimportlib.import_module('grok_engine.models')",
        "imports grok_",
    ),
    (
        "grok_engine/checkpoint/xai/reader.py",
        "import importlib\nimportlib.import_module(f())",
        "imports a computed name",
    ),
    ("grok_engine/unheard_of.py", "", "has no line in the table"),
    ("grok_engine/cli.py", "from tests import helpers", "imports tests.helpers"),
    ("grok_engine/cli.py", "from grok_bench.cli import bench", "imports grok_bench.cli outside of a function"),
    ("grok_engine/cli.py", "if True:\n    import grok_bench", "imports grok_bench outside of a function"),
    ("grok_engine/engine.py", "def f():\n    from grok_bench import schema", "imports grok_bench.schema"),
    ("kernels/grok_kernels/ops.py", "def f():\n    import grok_bench.schema", "imports grok_bench.schema"),
    ("benchmarks/grok_bench/schema.py", "from . import environment", "imports grok_bench.environment"),
    ("benchmarks/grok_bench/environment.py", "import grok_engine", "imports grok_engine"),
    ("kernels/grok_kernels/ops.py", "def f():\n    import grok_engine.config", "imports grok_engine.config"),
    ("kernels/grok_kernels/cpu.py", "from .reference import norm", "imports grok_kernels.reference.norm"),
    ("kernels/grok_kernels/cpu.py", "import triton", "imports triton"),
    ("kernels/grok_kernels/reference/norm.py", "import numpy", "imports numpy"),
    ("kernels/grok_kernels/reference/norm.py", "from .. import _C", "imports grok_kernels._C"),
    ("csrc/cpu/norm.cpp", "#include <torch/library.h>", "includes torch/library.h"),
    ("csrc/cpu/norm.cpp", '#include "../cuda/norm.h"', "includes ../cuda/norm.h"),
    ("csrc/common/types.h", '#include "cpu/isa.h"', "includes cpu/isa.h"),
]


@pytest.mark.parametrize(("path", "text", "error"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, text: str, error: str) -> None:
    clean = {
        "grok_engine/__init__.py": "from .engine import LLM",
        "grok_engine/config.py": "import json",
        "grok_engine/engine.py": "from grok_engine.runtime import runner\nfrom .config import X",
        "grok_engine/runtime/runner.py": "import torch\nfrom ..models.decoder import D",
        "grok_engine/runtime/scheduler.py": "from .allocator import A",
        "grok_engine/cli.py": "class C:\n    def f(self):\n        from grok_bench.cli import bench",
        "benchmarks/grok_bench/__init__.py": "",
        "benchmarks/grok_bench/cli.py": "from .environment import environment",
        "benchmarks/grok_bench/environment.py": "import grok_kernels\nfrom .schema import Environment",
        "benchmarks/grok_bench/schema.py": "import json",
        "grok_engine/runtime/__init__.py": "",
        "grok_engine/runtime/allocator.py": "import math",
        "grok_engine/runtime/pages.py": "import torch",
        "grok_engine/layers/__init__.py": "",
        "grok_engine/layers/moe.py": "import grok_kernels\nfrom grok_engine.config import X\ndevice = 'cuda'",
        "grok_engine/models/__init__.py": "",
        "grok_engine/models/decoder.py": "from ..layers import moe",
        "grok_engine/checkpoint/xai/reader.py": "import os",
        "kernels/grok_kernels/__init__.py": "from . import cpu, reference\nfrom .ops import x",
        "kernels/grok_kernels/cpu.py": "def f():\n    import grok_kernels._C as module\nfrom . import registry",
        "kernels/grok_kernels/ops.py": "import torch\nfrom . import registry\nx = torch.ops.grok",
        "kernels/grok_kernels/registry.py": "import logging",
        "kernels/grok_kernels/reference/__init__.py": "from . import norm",
        "kernels/grok_kernels/reference/norm.py": "import math, torch\nfrom ..registry import register",
        "csrc/bindings/norm.cpp": '#include <torch/library.h>\n#include "cpu/isa.h"',
        "csrc/common/types.h": "#include <cstdint>",
        "csrc/cpu/isa.h": '#include "../common/types.h"',
        "csrc/cpu/norm.cpp": '#include "isa.h"\n#include "common/types.h"\n#include <cmath>',
    }
    for name, content in clean.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert violations(tmp_path) == []
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text + "\n")
    found = violations(tmp_path)
    assert any(error in line for line in found), found


# What a start off a terminal does without. sentencepiece and ml_dtypes are for what `tiny` is stored as.
START = """
import sys, torch
before = set(sys.modules)
import grok_engine
imported = set(sys.modules) - before
llm = grok_engine.LLM("tiny", num_pages=4)
assert llm.generate([[5]], grok_engine.SamplingParams(max_tokens=1, ignore_eos=True))[0].outputs[0].token_ids
generated = set(sys.modules) - before
needless = {"click", "grok_bench", "llguidance", "rich", "safetensors", "tokenizers", "torch._dynamo",
            "torch._inductor", "torch.utils.cpp_extension", "triton"}
print(sorted((imported & {*needless, "sentencepiece"}) | (generated & needless)))
"""


def test_a_start_imports_nothing_that_the_first_token_does_not_need() -> None:
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr
