"""The sources keep to the rules of imports, and each rule finds a fault that is planted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import import_rules as rules

tomllib: Any = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).resolve().parents[1]


def test_every_import_is_allowed() -> None:
    assert {source.module for source in rules.read_sources(ROOT)} >= {"grok_engine.config", "grok_kernels.registry"}
    found = rules.violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_every_permission_is_used() -> None:
    found = rules.stale_permissions(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_no_circle() -> None:
    assert rules.circle(ROOT) == ""


def test_dependencies_are_imported_and_imports_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = rules.dependency_errors(ROOT, project)
    assert not found, "\n" + "\n".join(found)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


# Sources without a fault, in the shape of the real tree: each planted one changes a single file.
TABLE = {
    "grok_engine": ("engine",),
    "grok_engine.config": (),
    "grok_engine.engine": ("config", "runtime.runner"),
    "grok_engine.runtime": (),
    "grok_engine.runtime.allocator": (),
    "grok_engine.runtime.scheduler": ("runtime.allocator",),
    "grok_engine.runtime.runner": ("models",),
    "grok_engine.sampling": (),
    "grok_engine.layers": ("config", "grok_kernels"),
    "grok_engine.models": ("layers",),
    "grok_engine.checkpoint": (),
    "grok_engine.server": (".",),
    "grok_engine.cli": (".", "server", "grok_bench"),
    "grok_kernels": ("cpu", "ops", "reference"),
    "grok_kernels.cpu": ("registry", "_C"),
    "grok_kernels.ops": ("registry",),
    "grok_kernels.reference": ("registry",),
    "grok_kernels.registry": (),
    "grok_bench.cli": ("environment",),
    "grok_bench.environment": ("schema", "grok_kernels"),
    "grok_bench.schema": (),
}
CLEAN = {
    "grok_engine/__init__.py": "from .engine import LLM",
    "grok_engine/config.py": "import json",
    "grok_engine/engine.py": "from grok_engine.runtime import runner\nfrom .config import X",
    "grok_engine/runtime/__init__.py": "",
    "grok_engine/runtime/runner.py": "import torch\nfrom ..models.decoder import D",
    "grok_engine/runtime/scheduler.py": "from .allocator import A",
    "grok_engine/runtime/allocator.py": "import math",
    "grok_engine/runtime/pages.py": "import torch",
    "grok_engine/sampling/params.py": "",
    "grok_engine/layers/__init__.py": "",
    "grok_engine/layers/moe.py": "import grok_kernels\nfrom grok_engine.config import X\ndevice = 'cuda'",
    "grok_engine/models/__init__.py": "",
    "grok_engine/models/decoder.py": "from ..layers import moe",
    "grok_engine/checkpoint/xai/reader.py": "import os",
    "grok_engine/server/app.py": "from grok_engine import LLM",
    "grok_engine/cli.py": "from . import a\nclass C:\n    def f(self):\n        from grok_bench.cli import b\n"
    "        from .server import app",
    "benchmarks/grok_bench/cli.py": "from .environment import environment",
    "benchmarks/grok_bench/environment.py": "import grok_kernels\nfrom .schema import Environment",
    "benchmarks/grok_bench/schema.py": "import json",
    "kernels/grok_kernels/__init__.py": "from . import cpu, reference\nfrom .ops import x",
    "kernels/grok_kernels/_C.pyi": "",
    "kernels/grok_kernels/cpu.py": "def f():\n    import grok_kernels._C as module\nfrom . import registry",
    "kernels/grok_kernels/ops.py": "import torch\nfrom . import registry\nx = torch.ops.grok",
    "kernels/grok_kernels/registry.py": "import logging",
    "kernels/grok_kernels/reference/__init__.py": "from . import norm",
    "kernels/grok_kernels/reference/norm.py": "import math, torch\nfrom ..registry import register",
    "csrc/bindings/norm.cpp": '#include <torch/library.h>\n#include "cpu/isa.h"',
    "csrc/common/types.h": "#include <cstdint>",
    "csrc/cpu/include/grok/cpu.h": "#include <cstdint>",
    "csrc/cpu/isa.h": '#include "../common/types.h"',
    "csrc/cpu/norm.cpp": '#include "isa.h"\n#include "common/types.h"\n#include "grok/cpu.h"\n#include <cmath>',
}

PLANTED = [
    ("grok_engine/config.py", "import grok_engine.engine", "imports grok_engine.engine"),
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
    ("grok_engine/engine.py", "import grok_kernels._C", "imports grok_kernels._C"),
    ("grok_engine/checkpoint/xai/reader.py", "from torch import nn", "imports torch.nn"),
    ("grok_engine/checkpoint/xai/reader.py", "from torch.nn import Module", "imports torch.nn.Module"),
    ("grok_engine/cli.py", "from .config import X", "imports grok_engine.config"),
    ("grok_engine/cli.py", "from grok_bench.cli import bench", "imports grok_bench.cli outside of a function"),
    (
        "grok_engine/cli.py",
        "from .server import app",
        "imports grok_engine.server.app, which needs an extra, outside of",
    ),
    ("grok_engine/server/app.py", "from ..engine import E", "imports grok_engine.engine"),
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
    write(tmp_path, CLEAN)
    assert rules.violations(tmp_path, TABLE) == []
    write(tmp_path, {path: text})
    found = rules.violations(tmp_path, TABLE)
    assert any(error in line for line in found), found


def test_a_stale_permission_is_found(tmp_path: Path) -> None:
    write(tmp_path, CLEAN)
    assert rules.stale_permissions(tmp_path, TABLE) == []
    table = {**TABLE, "grok_engine.layers": (*TABLE["grok_engine.layers"], "sampling"), "grok_engine.serve": ()}
    assert rules.stale_permissions(tmp_path, table) == [
        "nothing in grok_engine.layers imports sampling",
        "grok_engine.serve is no module",
    ]
    # a permission for the package's __init__ is not used by an import of one of its modules
    write(
        tmp_path,
        {"grok_engine/cli.py": "from .config import X\ndef f():\n    import grok_bench.cli, grok_engine.server"},
    )
    assert rules.stale_permissions(tmp_path, TABLE) == ["nothing in grok_engine.cli imports ."]


@pytest.mark.parametrize(
    "text",
    [
        "from . import runner",
        "def f():\n    from .runner import R",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import grok_engine.runtime.runner",
        "async def f():\n    import importlib\n    importlib.import_module('grok_engine.runtime.runner')",
    ],
)
def test_a_circle_is_found(tmp_path: Path, text: str) -> None:
    files = {
        "grok_engine/runtime/runner.py": "from .flatten import F",
        "grok_engine/runtime/flatten.py": "import torch",
    }
    write(tmp_path, CLEAN | files)
    assert rules.circle(tmp_path) == ""
    write(tmp_path, {"grok_engine/runtime/flatten.py": text})
    a, b = "grok_engine.runtime.flatten", "grok_engine.runtime.runner"
    assert rules.circle(tmp_path) in (f"{a} imports {b} imports {a}", f"{b} imports {a} imports {b}")


PROJECT = {
    "dependencies": ["torch>=2", "rich; sys_platform == 'linux'"],
    "optional-dependencies": {
        "structured": ["llguidance>=1"],
        "eval": ["lm-eval>=0.4"],
        "serve": ["starlette>=1"],
        "bench": ["matplotlib", "gguf"],
        "dev": ["pytest", "ruff==1", "llguidance>=1"],
    },
}
DECLARED = {
    "Makefile": "lint:\n\t$(BIN)/ruff check .",
    "grok_engine/cli.py": "import os, rich",
    "grok_engine/sampling/structured.py": "def f():\n    import llguidance",
    "grok_engine/tools/lm_eval.py": "import lm_eval.api",
    "grok_engine/server/app.py": "import starlette",
    "benchmarks/grok_bench/figure.py": "import matplotlib",
    "benchmarks/grok_bench/peers.py": "def f():\n    import deep_gemm, kt_kernel",
    "benchmarks/gguf_writer.py": "import gguf",
    "tests/test_all.py": "import pytest",
}
MISFITS = [
    ("grok_engine/cli.py", "", "nothing imports rich, a dependency"),
    ("grok_engine/cli.py", "import rich, requests.sessions", "imports requests, which pyproject.toml does not declare"),
    ("grok_engine/cli.py", "def f():\n    import matplotlib", "imports matplotlib, which pyproject.toml does not"),
    ("grok_engine/sampling/structured.py", "import llguidance", "llguidance, which is optional, outside of a function"),
    ("grok_engine/tools/eval.py", "import lm_eval", "lm_eval, which is optional, outside of a function"),
    ("grok_engine/cli.py", "import rich, starlette", "imports starlette, which is optional, outside of a function"),
    ("grok_engine/server/app.py", "", "nothing imports starlette, of the extra serve"),
    (
        "grok_engine/cli.py",
        "import rich\nfrom .tools import lm_eval",
        "imports grok_engine.tools.lm_eval, which needs an",
    ),
    ("grok_engine/sampling/structured.py", "", "nothing imports llguidance, of the extra structured"),
    ("benchmarks/grok_bench/figure.py", "", "nothing imports matplotlib, of the extra bench"),
    ("benchmarks/grok_bench/peers.py", "def f():\n    import flashinfer, kt_kernel", "deep_gemm, of PEERS"),
    (
        "benchmarks/grok_bench/peers.py",
        "import deep_gemm\ndef f():\n    import kt_kernel",
        "deep_gemm, which is optional",
    ),
    ("benchmarks/gguf_writer.py", "", "nothing imports gguf, of the extra bench"),
    ("tests/test_all.py", "", "nothing imports pytest, of the extra dev"),
    ("Makefile", "lint:\n\truff check .", "nothing imports ruff, of the extra dev"),
]


@pytest.mark.parametrize(("path", "text", "error"), MISFITS)
def test_a_dependency_that_does_not_fit_is_found(tmp_path: Path, path: str, text: str, error: str) -> None:
    write(tmp_path, CLEAN | DECLARED)
    assert rules.dependency_errors(tmp_path, PROJECT) == []
    write(tmp_path, {path: text})
    found = rules.dependency_errors(tmp_path, PROJECT)
    assert any(error in line for line in found), found


# What the first token does not need where there is no terminal. (tiny needs sentencepiece and ml_dtypes.)
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
