"""Chat templates: Jinja2 in its immutable sandbox, with what transformers gives a template, and with bounds.

A template comes with a model's files, so it is hostile input. It computes in a sandbox without files, modules and
private attributes, and every loop, call, operator and filter costs from a budget of work, so that no template runs for
ever or fills the memory. A list that holds another twice doubles what writing or comparing it costs, which nothing can
interrupt: each list, tuple and dict that a template makes is measured with all that it holds.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_TEMPLATE = 1 << 17  # characters of a template; the longest in use have 20,000
MAX_WORK = 1 << 26  # characters that one rendering may produce, results between included; an element of a list counts 8
MAX_OUTPUT = 1 << 24
ELEMENT = 64  # characters that an element counts in the text of a list, with all that the list holds
SECONDS = 4.0


class _Work:
    """What one rendering may still cost."""

    def __init__(self) -> None:
        self.left, self.deadline = MAX_WORK, time.monotonic() + SECONDS
        self._known: dict[int, tuple[int, Any]] = {}  # what `measure` found, by `id`, and what keeps that from reuse

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise TemplateError(f"the template produces more than {MAX_WORK} characters in all")
        if time.monotonic() > self.deadline:
            raise TemplateError(f"the template runs longer than {SECONDS:g} s")

    def measure(self, value: Any) -> int:
        """Characters of `value` as text, about. Each list, tuple and dict is measured once: none ever changes.
        TemplateError for too many."""
        if isinstance(value, str) or not isinstance(value, _CONTAINERS):
            return len(value) if isinstance(value, str) else 0
        if (known := self._known.get(id(value))) is not None:
            return known[0]
        self.spend(ELEMENT + 8 * len(value))
        size = ELEMENT * len(value) + self.measure_all(_held(value))
        self._known[id(value)] = size, value
        return size

    def measure_all(self, values: Iterable[Any]) -> int:
        if (size := sum(map(self.measure, values))) > MAX_WORK:
            raise TemplateError(f"lists and dicts have more than {MAX_WORK} characters, with all that they hold")
        return size


_CONTAINERS: tuple[type[Any], ...] = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))
_PLAIN = {int, float, bool, type(None)}


def _held(value: Collection[Any]) -> list[Any]:
    """What a list, tuple, dict or view holds, numbers apart."""
    held = [*value, *value.values()] if isinstance(value, dict) else value
    return [item for item in held if type(item) not in _PLAIN]


_work: ContextVar[_Work] = ContextVar("work")


def render(template: str, values: Mapping[str, Any], name: str) -> str:
    """The text that a template makes of `values`. ValueError, with `name` and the template's own message, for one that
    cannot be parsed, fails, or exceeds the bounds."""
    pieces, size = [], 0
    with _bounded(template, name):
        for piece in _compiled(template).generate(values):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT:
                raise TemplateError(f"the template writes more than {MAX_OUTPUT} characters")
    return "".join(pieces)


@contextmanager
def _bounded(template: str, name: str) -> Iterator[None]:
    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"{name}: the chat template has {len(template)} characters, expected at most {MAX_TEMPLATE}")
    token = _work.set(_Work())
    try:
        yield
    except RecursionError:
        raise ValueError(f"{name}: chat template: it is nested too deeply") from None
    except Exception as error:  # a template is a program: it can raise anything
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        line = f" (line {error.lineno})" if isinstance(getattr(error, "lineno", None), int) else ""  # type: ignore[attr-defined]
        raise ValueError(f"{name}: chat template{line}: {kind}{error}") from None
    finally:
        _work.reset(token)


def string_constants(template: str, name: str) -> tuple[str, ...]:
    """The strings that a template compares with, searches for and writes in expressions. ValueError as of `render`."""
    with _bounded(template, name):
        return _constants(template)


@lru_cache(16)
def _constants(template: str) -> tuple[str, ...]:
    found = _environment().parse(template).find_all(nodes.Const)
    return tuple(dict.fromkeys(node.value for node in found if isinstance(node.value, str)))


@lru_cache(16)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@lru_cache(1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Tick, _Generation, loopcontrols])
    environment.filters = {n: _counted(n, f) for n, f in environment.filters.items() if n not in _UNBOUNDED}
    environment.filters["tojson"] = _tojson
    environment.globals = {
        "range": environment.globals["range"], "dict": _dict, "namespace": _Namespace,
        "raise_exception": _raise_exception, "strftime_now": _strftime_now,
    }  # fmt: skip
    return environment


class _Tick(Extension):
    """Makes every loop and macro cost work each time round."""

    def tick(self) -> None:
        _work.get().spend(1)

    def node(self) -> nodes.ExprStmt:
        return nodes.ExprStmt(self.call_method("tick"))


class _Generation(Extension):
    """`{% generation %}`, which marks for training what a model said: here its body alone."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Callable[[], str]) -> str:
        return caller()


# Filters and methods whose results may be far longer than what they are given, or take far longer to compute.
_UNBOUNDED = {"batch", "center", "pprint", "random", "slice", "striptags", "sum", "urlize", "wordwrap", "xmlattr"}
_UNSAFE = {"center", "encode", "expandtabs", "format_map", "ljust", "rjust", "to_bytes", "translate", "zfill"}


class _Code(CodeGenerator):
    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b` by the sandbox's `concat`, which counts."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._measured(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._measured(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._measured(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _measured(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.measured(")
        visit(node, frame)
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    @staticmethod
    def concat(parts: Iterable[Any]) -> str:
        values = list(parts)
        _work.get().measure_all(values)
        text = "".join(map(str, values))
        _spend(text)
        return text

    @staticmethod
    def measured(value: Any) -> Any:
        _spend(value)
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        tick = self.extensions[_Tick.identifier]
        assert isinstance(tick, _Tick)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            assert isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock))
            node.body.insert(0, tick.node())
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and not (abs(left) < 1 << 32 and abs(right) < 64):
            raise SecurityError(f"{left!r:.40} ** {right!r:.40} is too large")
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
        result = super().call_binop(context, operator, left, right)
        _spend(result)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and attr not in _UNSAFE

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        given = (value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars"))  # Jinja's own
        _work.get().measure_all((*args, *given))  # a macro has them as a tuple and a dict
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format`
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name == "replace":
                _spend_replacing(owner, *args[:2])
            elif name == "join":
                _spend_joining(owner, args[0] if args else ())
            elif name == "format":
                _check_widths(owner)
        result = super().call(__context, __obj, *args, **kwargs)
        _spend(result)
        return result


def _spend(result: Any) -> None:
    size = len(result) if isinstance(result, Sized) else 0
    _work.get().spend(1 + (size if isinstance(result, str) else 8 * size))
    _work.get().measure_all((result,))


def _check_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, Sized) and isinstance(times, int):
            _work.get().spend((1 if isinstance(value, str) else 8) * len(value) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
        raise SecurityError("a product is too large")


def _spend_replacing(text: Any = "", old: Any = "", new: Any = "", *_: Any) -> None:
    for a, b in ((old, new), (new, old)):  # in either order, as they may be given by name
        if isinstance(text, str) and isinstance(a, str) and isinstance(b, str):
            _work.get().spend(text.count(a) * len(b) if len(b) > len(a) else 0)


def _spend_joining(between: Any, parts: Any) -> None:
    if isinstance(between, str):
        _work.get().spend(len(between) * (len(parts) if isinstance(parts, Sized) else MAX_RANGE))


def _measured_each(parts: Any) -> Any:
    """The parts that a filter joins, of which a generator may give out the same long list again and again."""
    return map(_spend_on_text, parts) if isinstance(parts, Iterator) else parts


def _spend_on_text(part: Any) -> Any:
    _work.get().spend(1 + _work.get().measure_all((part,)))
    return part


def _check_widths(text: str) -> None:
    """A width in a format, `%99999d` or `{:>{n}}`, makes a text of any length."""
    if re.search(r"%[^a-zA-Z%]*(\*|\d{5})|\{[^{}]*(\{|\d{5})", text):
        raise SecurityError(f"the format {text!r:.80} has a width that is too large")


def _check_indent(width: Any) -> None:
    if (isinstance(width, int) and width > 100) or (isinstance(width, str) and len(width) > 100):
        raise SecurityError(f"an indent of {width!r:.40} is too large")


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that costs the size of its result."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if name == "replace":
            _spend_replacing(*(value for value in given if isinstance(value, str)))
        elif name == "join":
            _spend_joining(kwargs.get("d", args[2] if len(args) > 2 else ""), args[1])
            args = (args[0], _measured_each(args[1]), *args[2:])
        elif name == "format":
            _check_widths(str(args[0]))
        elif name == "indent":
            for value in given[1:]:
                _check_indent(value)
        result = function(*args, **kwargs)
        _spend(result)
        return result

    for mark in ("jinja_pass_arg", "jinja_async_variant"):  # whether jinja passes its context first
        if hasattr(function, mark):
            setattr(counted, mark, getattr(function, mark))
    return counted


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: HTML stays as it is."""
    _check_indent(indent)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _spend(text)
    return text


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    _check_widths(format)
    return datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Namespace(Namespace):
    """Takes no private names, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        _check_names(values)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_names((name,))
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:  # without what it holds, which may be more than fits into memory
        return "<Namespace>"


def _check_names(names: Iterable[Any]) -> None:
    for name in names:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the private name {name!r}")
