"""FlashInfer-Trace, the format of flashinfer-bench's data sets: read as problems and contestants, and written.

A folder has `definitions/**/*.json` (an op: axes, inputs, outputs, reference code), `workloads/**/*.jsonl` (values of
the axes, and what the inputs are) and `solutions/**/*.json` (code that computes a definition); a solution's results,
its traces, are flashinfer-bench's to take. The schema: https://bench.flashinfer.ai/docs/flashinfer-trace.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import own
from .case import Case
from .contestant import Call, Contestant, register
from .data import Weights
from .problems import Problem, family

RANDOM = 1 << 20  # bytes from which a written input is drawn anew, and not kept
HERE = ("python", "triton")  # languages of solutions that run without building anything


def read(folder: Path) -> None:
    """Register a data set: a problem DEFINITION/WORKLOAD for each workload, a contestant for each solution.

    ValueError for a folder that is none, or what the schema does not have.
    """
    definitions = {d["name"]: d for d in _json(folder / "definitions")}
    if not definitions:
        raise ValueError(f"{folder} has no definitions/**/*.json")
    workloads: dict[str, dict[str, Any]] = {}
    for line in _json(folder / "workloads"):
        workloads.setdefault(line["definition"], {})[line["workload"]["uuid"]] = line["workload"]
    for name, known in workloads.items():
        build = partial(_build, folder, definitions[name], known)
        family(name, "{workload}", {"workload": tuple(known)}, modelled=False)(build)
    for s in _json(folder / "solutions"):
        if s["definition"] in workloads:
            language = s["spec"]["language"]
            why = "" if language in HERE else f"{language} needs building: run it with flashinfer-bench"
            bind = partial(_bind, definitions[s["definition"]], s)
            register(Contestant(name=s["name"], op=s["definition"], bind=bind, missing=partial(str, why)))


def _json(folder: Path) -> Iterator[Any]:
    """What the files under a folder hold."""
    for path in sorted(folder.rglob("*.json*")):
        text = path.read_text(encoding="utf-8")
        yield from map(json.loads, filter(None, text.splitlines()) if path.suffix == ".jsonl" else [text])


def _safetensors() -> Any:
    """ValueError where the package is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("FlashInfer-Trace needs safetensors: pip install '.[bench]'") from None
    return safetensors.torch


@cache
def _function(files: tuple[tuple[str, str], ...], entry_point: str) -> Callable[..., Any]:
    """The function FILE::NAME of sources, which may import one another."""
    file, name = entry_point.split("::")
    folder = Path(tempfile.mkdtemp(prefix="grok-bench-"))
    for path, content in files:
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise ValueError(f"the source {path!r} lies outside of its folder")
        _put(folder / path, content)
    spec = spec_from_file_location(f"grok_bench_{uuid.uuid4().hex}", folder / file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    found: Callable[..., Any] = getattr(module, name)
    return found


def _sizes(d: Mapping[str, Any], axes: Mapping[str, int], tensor: Mapping[str, Any]) -> list[int] | None:
    """The shape of a tensor of a definition, of which `axes` are the variable ones; None for a scalar."""
    values = {axis: a.get("value") for axis, a in d["axes"].items()} | dict(axes)
    return None if tensor["shape"] is None else [values[axis] for axis in tensor["shape"]]


def _build(
    folder: Path, d: Mapping[str, Any], workloads: Mapping[str, Any], p: Problem, device: str, cold: int
) -> Case:
    workload = workloads[str(p["workload"])]
    run = _function((("main.py", d["reference"]),), "main.py::run")

    def make() -> list[Any]:
        return [_input(folder, device, d, workload, name) for name in d["inputs"]]

    return own.case(make, run, cold, 0.0, names=list(d["inputs"]))


def _input(folder: Path, device: str, d: Mapping[str, Any], workload: Mapping[str, Any], name: str) -> Any:
    tensor, given = d["inputs"][name], workload["inputs"].get(name, {"type": "random"})
    if given["type"] == "scalar":
        return given["value"]
    if given["type"] == "safetensors":
        return _safetensors().load_file(folder / given["path"])[given["tensor_key"]].to(device, copy=True)
    sizes, dtype = _sizes(d, workload["axes"], tensor), getattr(torch, tensor["dtype"])
    if not dtype.is_floating_point:
        most = 2 if dtype == torch.bool else 128 if dtype == torch.int8 else 1024
        x = torch.randint(0 if dtype == torch.bool else -most, most, sizes or (), device=device).to(dtype)
    else:
        x = torch.randn(sizes or (), device=device)
        x = (x.clamp(-2, 2) if dtype.itemsize == 1 else x).to(dtype)
        if d["op_type"] == "sampling" and name == "probs":
            x = torch.softmax(x, -1)
    return x if sizes is not None else x.item()


def _bind(d: Mapping[str, Any], solution: Mapping[str, Any], inputs: Any) -> Call:
    spec = solution["spec"]
    run = _function(tuple((f["path"], f["content"]) for f in solution["sources"]), spec["entry_point"])
    if not spec.get("destination_passing_style", True):
        return lambda: run(*inputs.args)
    axes: dict[str, int] = {}
    for tensor, x in zip(d["inputs"].values(), inputs.args, strict=True):
        axes |= dict(zip(tensor["shape"] or (), getattr(x, "shape", ()), strict=True))
    device = next((x.device for x in inputs.args if isinstance(x, Tensor)), None)
    made = [
        torch.empty(_sizes(d, axes, t) or (), dtype=getattr(torch, t["dtype"]), device=device)
        for t in d["outputs"].values()
    ]

    def call() -> Any:  # the function fills its results, which come after its arguments
        run(*inputs.args, *made)
        return made[0] if len(made) == 1 else made

    return call


# Writing


def write(folder: Path, problem: Problem, case: Case, contestants: Sequence[Contestant]) -> None:
    """Add a problem of ours to a data set: definition, workload, and a solution for each contestant.

    What the format cannot hold is left out: contestants with `prepare` and peers, which have no source of their own.
    """
    name = re.sub(r"[/:,=]+", "-", problem.name)
    variable = {axis: v for axis, v in problem.values if isinstance(v, int)}
    axes, inputs, given = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    stored, called = dict[str, Tensor](), list[str]()
    blob = f"blob/workloads/{name}.safetensors"

    def tensor(x: Tensor) -> dict[str, Any]:
        """Its axes by name, and its dtype: the problem's own axes are variable, all others constant."""
        named = [next((axis for axis, v in variable.items() if v == size), f"n{size}") for size in x.shape]
        for axis, size in zip(named, x.shape, strict=True):
            axes[axis] = {"type": "var"} if axis in variable else {"type": "const", "value": size}
        return {"shape": named, "dtype": str(x.dtype).removeprefix("torch.")}

    def add(key: str, x: Any) -> str:
        """Describe one argument; return what stands for it in a call."""
        if isinstance(x, Weights):
            planes = ", ".join(f"{name}={add(f'{key}_{name}', plane)}" for name, plane in x.planes.items())
            return f"grok_kernels.Weight.of({planes}, format={x.format!r})"
        if isinstance(x, Tensor):
            inputs[key], given[key] = tensor(x), {"type": "random"}
            if x.nbytes < RANDOM or not x.dtype.is_floating_point:  # indices cannot be drawn
                stored[key] = x.contiguous().cpu()
                given[key] = {"type": "safetensors", "path": blob, "tensor_key": key}
        elif isinstance(x, (int, float)):
            inputs[key] = {"shape": None, "dtype": {bool: "bool", int: "int64", float: "float32"}[type(x)]}
            given[key] = {"type": "scalar", "value": x}
        return key if key in inputs else repr(x)

    def source(function: str, imports: str = "import grok_kernels", within: str = "") -> str:
        body = f"{within}return {function}({', '.join(called)})"
        return f"import torch\n{imports}\n\n\ndef run({', '.join(inputs)}):\n    {body}\n"

    called += [add(key, x) for key, x in zip(case.names, case.inputs[0].args, strict=False)]
    due = case.due(case.inputs[0]) if case.due else case.truth()
    outputs = {f"result{i}": tensor(x) for i, x in enumerate(due if isinstance(due, (list, tuple)) else [due])}
    op = f"grok_kernels.{problem.op}"
    if problem.family.modelled:
        reference = source(op, within="with grok_kernels.use_backend('reference'): ")
    else:
        reference = source(case.source[1], _plain(Path(case.source[0])))
    definition = {"name": name, "op_type": problem.op, "axes": axes, "inputs": inputs, "outputs": outputs}
    _put(folder / f"definitions/{problem.op}/{name}.json", json.dumps({**definition, "reference": reference}, indent=1))
    if stored:
        (folder / blob).parent.mkdir(parents=True, exist_ok=True)
        _safetensors().save_file(stored, folder / blob)
    sizes = {axis: v for axis, v in variable.items() if axis in axes}
    workload = {"axes": sizes, "inputs": given, "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, problem.name))}
    _put(folder / f"workloads/{problem.op}/{name}.jsonl", json.dumps({"definition": name, "workload": workload}))
    for c in contestants:
        if c.instead or c.missing() or not (c.ours or c.source):
            continue
        if c.source:
            plugin, function = Path(c.source[0]), c.source[1]
            imports = f"import grok_kernels\nfrom {plugin.stem} import {function}"
            files = {"main.py": source(function, imports), plugin.name: _plain(plugin)}
        else:
            backend = c.name.removeprefix("grok_kernels ")
            files = {"main.py": source(op, within=f"with grok_kernels.use_backend({backend!r}): ")}
        spec = {"language": "python", "target_hardware": list(c.devices), "entry_point": "main.py::run"}
        solution = {
            "name": f"{c.name} {name}".replace(" ", "_"), "definition": name, "author": "grok_bench",
            "spec": {**spec, "destination_passing_style": False},
            "sources": [{"path": path, "content": text} for path, text in files.items()],
        }  # fmt: skip
        file = folder / f"solutions/grok_bench/{problem.op}/{name}/{solution['name']}.json"
        _put(file, json.dumps(solution, indent=1))


def _put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")


def _plain(file: Path) -> str:
    """The source of a plug-in without what is of grok_bench: imports, decorators and calls."""
    kept = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [d for d in node.decorator_list if "grok_bench" not in ast.unparse(d)]
        elif isinstance(node, ast.Import):
            node.names = [a for a in node.names if a.name != "grok_bench"]
        if getattr(node, "names", True) and (
            isinstance(node, ast.FunctionDef) or "grok_bench" not in ast.unparse(node)
        ):
            kept.append(node)
    return ast.unparse(ast.Module(kept, [])) + "\n"
