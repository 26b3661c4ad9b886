"""`@op`: from one annotated function to an op of torch, with its schema, its fake, its checks and its dispatch.

The function is the op's contract: its signature is what users call and what the schema is inferred from, its docstring
says what is computed, and its body checks the arguments and returns, by `result`, the shape and dtype of each result.
What computes is a backend's kernel, which takes the same arguments by position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from inspect import Parameter, Signature
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import registry
from ..weights import Weight

Function = TypeVar("Function", bound=Callable[..., Any])
_lib = torch.library.Library("grok", "DEF")
_parameters: dict[str, tuple[Parameter, ...]] = {}


class _Result(NamedTuple):
    shape: tuple[Any, ...]
    dtype: torch.dtype


def result(shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """A result as the body of an op states it: a tensor to the type checker, in fact its shape and dtype alone, since
    the checks run before every kernel on a GPU and must not allocate."""
    return cast("Tensor", _Result(tuple(shape), dtype))


def op(*, writes: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Define `grok::<name of the function>`. writes: the arguments that the op writes in place."""

    def define(check: Function) -> Function:
        name, signature = check.__name__, inspect.signature(check, eval_str=True)
        _parameters[name], bind = tuple(signature.parameters.values()), _Binding(signature)
        _lib.define(_schema(name, signature, writes))
        overload = getattr(torch.ops.grok, name).default

        def fake(*flat: Any) -> Any:
            results = check(*unflatten(name, flat))
            if isinstance(results, _Result):
                return flat[0].new_empty(results.shape, dtype=results.dtype)
            return tuple(flat[0].new_empty(shape, dtype=dtype) for shape, dtype in results)

        def run(*flat: Any) -> Any:
            args = unflatten(name, flat)
            check(*args)
            return registry.call(name, *args)

        def autograd(*flat: Any) -> Any:
            if _differentiated(flat):
                with registry.use_backend("reference"):
                    return run(*flat)
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*flat)

        torch.library.register_fake(f"grok::{name}", fake, lib=_lib)
        _lib.impl(name, run, "CompositeExplicitAutograd")
        _lib.impl(name, autograd, "Autograd")

        @wraps(check)
        def call(*args: Any, **named: Any) -> Any:
            if named or len(args) != bind.count:
                args = bind(args, named)
            key = None
            if not torch.compiler.is_dynamo_compiling():
                kernel, key = registry.shortcut(name, args)
                if kernel is not None:
                    return kernel.fn(*args)
            try:
                found = overload(*flatten(name, args))
            except RuntimeError as error:  # the dispatcher refuses a type that the schema does not have
                if "Expected a value of type" not in str(error):
                    raise
                raise ValueError(" ".join(str(error).split("Declaration:")[0].split())) from None
            if key is not None:
                registry.remember(key, args)
            return found

        return cast("Function", call)

    return define


def _schema(name: str, signature: Signature, writes: Sequence[str]) -> str:
    """torch's schema of the op. A `Weight`, which a schema cannot hold, is three arguments: planes, form and shape."""
    flat: list[Parameter] = []
    for p in signature.parameters.values():
        if p.annotation is Weight:
            parts = {p.name: list[Tensor], f"{p.name}_form": str, f"{p.name}_shape": list[int]}
            flat += [Parameter(part, p.kind, annotation=kind) for part, kind in parts.items()]
        else:
            flat.append(p.replace(default=Parameter.empty))  # `call` fills in defaults

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=writes, op_name=name)


def flatten(name: str, args: Sequence[Any]) -> list[Any]:
    """The arguments as the schema has them. ValueError for one that is no weight, or dtype, where that is expected."""
    flat: list[Any] = []
    for p, value in zip(_parameters[name], args, strict=True):
        if p.annotation is Weight:
            if not isinstance(value, Weight):
                raise ValueError(f"{name}: {p.name} is a {type(value).__name__}, expected a Weight (see Weight.of)")
            flat += [value.planes, f"{value.format}/{value.layout}", value.shape]
            continue
        if p.annotation in (torch.dtype, torch.dtype | None) and not isinstance(value, p.annotation):
            optional = "" if p.annotation is torch.dtype else " or None"
            raise ValueError(f"{name}: {p.name}={value!r}, expected torch.float32, torch.bfloat16{optional}")
        flat.append(value)
    return flat


def unflatten(name: str, flat: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments as the function and the kernels have them, from those of the schema."""
    args: list[Any] = []
    rest = iter(flat)
    for p in _parameters[name]:
        value = next(rest)
        if p.annotation is Weight:
            format, _, layout = next(rest).partition("/")
            value = Weight(format, layout, tuple(next(rest)), tuple(value))
        args.append(value)
    return tuple(args)


def tensors_in(flat: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among these values, and in their lists and tuples."""
    for a in flat:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from tensors_in(a)


def _differentiated(flat: Sequence[Any]) -> bool:
    """Whether a gradient is wanted, or one of the tensors has a tangent of forward-mode differentiation."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(flat)):
        return True
    if forward_ad._current_level < 0:  # outside of `dual_level` and `torch.func.jvp`: no tensor has one
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors_in(flat))


class _Binding:
    """All arguments by position, defaults filled in, in a tenth of the time of `Signature.bind`."""

    def __init__(self, signature: Signature) -> None:
        self.signature, self.count = signature, len(signature.parameters)
        parameters = tuple(signature.parameters.values())
        # for each number of positional arguments, the others with their defaults, and the names that must be given
        self.rest = [{p.name: p.default for p in parameters[given:]} for given in range(self.count + 1)]
        self.required = [{n for n, default in rest.items() if default is Parameter.empty} for rest in self.rest]

    def __call__(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        given = len(args)
        if given > self.count or not self.required[given] <= named.keys() <= self.rest[given].keys():
            self.signature.bind(*args, **named)  # raises the TypeError
        return (*args, *(self.rest[given] | named).values())
