"""The stack machine that evaluates a pickle of arrays symbolically (see `pickles`).

A byte string becomes its place in the file, a global becomes its name; nothing is imported, called or copied.
Every quantity that a file could make large is bounded: opcodes, stack, memo, nesting, lengths of names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np


class PickleError(ValueError):
    """What was expected and what was found; `pickles` adds the name of the file."""


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """An array as it lies in its file. `fortran`: the first axis is the fastest."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    nbytes: int
    fortran: bool


_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy.core.numeric", "_frombuffer"): "frombuffer",
    ("numpy._core.numeric", "_frombuffer"): "frombuffer",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("ml_dtypes", "bfloat16"): "bfloat16",
    ("__main__", "QuantizedWeight8bit"): "quantized",
}
_CALLS = {
    "reconstruct": "_reconstruct(ndarray, (0,), b'b')",
    "frombuffer": "_frombuffer(bytes, dtype, shape, 'C' or 'F')",
    "dtype": "dtype(..., False, True)",
}
_DTYPES = {name: np.dtype("<" + name) for name in ("f2", "f4", "f8", "i2", "i4", "i8", "u2", "u4", "u8")} | {
    name: np.dtype(name) for name in ("b1", "i1", "u1")
}
_BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class _Global:
    kind: str


@dataclass(frozen=True, slots=True)
class _Bytes:
    offset: int
    length: int
    mutable: bool  # a bytearray: only _frombuffer takes one
    value: bytes | None  # of a single byte


class _Tuple(tuple[Any, ...]):
    depth: int


@dataclass(slots=True, eq=False)
class _DType:
    dtype: np.dtype[Any]
    built: bool = False


@dataclass(slots=True, eq=False)
class _Array:
    place: ArrayPlace | None = None


@dataclass(slots=True, eq=False)
class _Object:
    attributes: dict[str, Any] | None = None


_MARK = object()
_KINDS = {
    _Global: "a global",
    _Bytes: "a byte string",
    _Tuple: "a tuple",
    _DType: "a dtype",
    _Array: "an array",
    _Object: "an object",
    type(_MARK): "a mark",
    type(None): "None",
    dict: "a dict",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
}

# Named when refused: these are the opcodes by which a pickle runs code.
_REFUSED = {
    b"i": "INST",
    b"o": "OBJ",
    b"\x92": "NEWOBJ_EX",
    b"P": "PERSID",
    b"Q": "BINPERSID",
    b"\x82": "EXT1",
    b"\x83": "EXT2",
    b"\x84": "EXT4",
    b"\x97": "NEXT_BUFFER",
}

# A file of the release has some 115 opcodes, at most 16 values on the stack and tuples in tuples.
_MAX_OPCODES = 1000
_MAX_STACK = 100
_MAX_MEMO_INDEX = 10_000
_MAX_NESTING = 4
_MAX_TEXT = 255
_MAX_DIMENSIONS = 8


class Machine:
    """file: buffered, at its start. size: its length."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.opcode_at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> tuple[ArrayPlace, ArrayPlace | None]:
        """Where the array lies, or the weight and its scales. PickleError for any other file."""
        if self.size == 0:
            raise self.fail("a pickle", "an empty file")
        if (first := self.take(1, "a pickle")) != b"\x80":
            raise self.fail("a pickle of protocol 2 or later", f"first byte 0x{first.hex()}")
        if not 2 <= (protocol := self.number(1, "the protocol")) <= 5:
            raise self.fail("a pickle of protocol 2 to 5", f"protocol {protocol}")
        for _ in range(_MAX_OPCODES):
            self.opcode_at = self.file.tell()
            code = self.take(1, "an opcode")
            if code == b".":
                return self.result()
            if code not in _OPCODES:
                raise self.refusal(code)
            _OPCODES[code](self)
        raise self.fail(f"at most {_MAX_OPCODES} opcodes", "more")

    def refusal(self, code: bytes) -> PickleError:
        name = _REFUSED.get(code, "")
        if name == "INST":
            self.push_global(self.line(), self.line())
        if name.startswith("EXT"):
            name += f" {self.number(int(name[-1]), 'an extension code')}"
        if name == "PERSID":
            name += f" {self.line()!r}"
        return self.fail(
            "the opcodes of a numpy array", f"opcode 0x{code.hex()}" + (f", {name}; refused" if name else "")
        )

    def result(self) -> tuple[ArrayPlace, ArrayPlace | None]:
        value = self.pop()
        if self.stack:
            raise self.fail("one value at the end", f"{len(self.stack)} more")
        if (left := self.size - self.file.tell()) > 0:
            raise self.fail("the end of the file", f"{left} more bytes")
        if type(value) is _Array:
            return self.filled("the array", value), None
        attributes = self.check(value, _Object).attributes or {}
        if set(attributes) != {"weight", "scales"}:
            raise self.fail("the attributes weight and scales", ", ".join(sorted(attributes)) or "neither")
        return self.filled("weight", attributes["weight"]), self.filled("scales", attributes["scales"])

    def filled(self, what: str, value: Any) -> ArrayPlace:
        place: ArrayPlace | None = self.check(value, _Array).place
        if place is None:
            raise self.fail(f"the contents of {what}", "none")
        return place

    def fail(self, expected: str, found: str) -> PickleError:
        return PickleError(f"expected {expected}, found {found} (opcode at byte {self.opcode_at} of {self.size})")

    # -- bytes

    def ahead(self, n: int, what: str) -> int:
        """n, where the file has so many bytes more."""
        left = self.size - self.file.tell()
        if n > left:
            raise self.fail(f"{what} of {n} bytes", f"the end of the file after {left}: truncated")
        return n

    def take(self, n: int, what: str) -> bytes:
        data = self.file.read(self.ahead(n, what))
        if len(data) < n:
            raise self.fail(f"{what} of {n} bytes", f"{len(data)}: the file shrinks while it is read")
        return data

    def number(self, n: int, what: str = "a number", *, signed: bool = False) -> int:
        return int.from_bytes(self.take(n, what), "little", signed=signed)

    def frame(self) -> None:
        self.ahead(self.number(8, "the length of a frame"), "a frame")

    def place(self, length_bytes: int, *, mutable: bool = False) -> _Bytes:
        length = self.ahead(self.number(length_bytes, "the length of a byte string"), "a byte string")
        offset = self.file.tell()
        value = self.take(1, "a byte string") if length == 1 else None
        self.file.seek(offset + length)
        return _Bytes(offset, length, mutable, value)

    def text(self, length_bytes: int) -> str:
        length = self.number(length_bytes, "the length of a string")
        if length > _MAX_TEXT:
            raise self.fail(f"a string of at most {_MAX_TEXT} bytes", f"one of {length}")
        return self.decode(self.take(length, "a string"))

    def line(self) -> str:
        line = self.file.readline(_MAX_TEXT + 1)
        if len(line) > _MAX_TEXT and not line.endswith(b"\n"):
            raise self.fail(f"a name of at most {_MAX_TEXT} bytes", "a longer one")
        if not line.endswith(b"\n"):
            raise self.fail("the name of a global", f"the end of the file after {len(line)}: truncated")
        return self.decode(line[:-1])

    def decode(self, text: bytes) -> str:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string in UTF-8", repr(text)) from None

    # -- stack and memo

    def push(self, value: Any) -> None:
        if len(self.stack) >= _MAX_STACK:
            raise self.fail(f"a stack of at most {_MAX_STACK} values", "one more")
        self.stack.append(value)

    def pop(self, kind: type | None = None) -> Any:
        value = self.top()
        del self.stack[-1]
        return value if kind is None else self.check(value, kind)

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise self.fail("a value on the stack", "a mark" if self.stack else "none")
        return self.stack[-1]

    def check(self, value: Any, kind: type) -> Any:
        if type(value) is not kind:
            raise self.fail(_KINDS[kind], _KINDS[type(value)])
        return value

    def popped_to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise self.fail("a mark on the stack", "none")
        del self.stack[-1]
        return items[::-1]

    def push_tuple(self, items: list[Any]) -> None:
        value = _Tuple(items)
        value.depth = 1 + max((x.depth for x in items if type(x) is _Tuple), default=0)
        if value.depth > _MAX_NESTING:
            raise self.fail(f"tuples nested at most {_MAX_NESTING} deep", "deeper ones")
        self.push(value)

    def memoize(self, index: int) -> None:
        if index > _MAX_MEMO_INDEX:
            raise self.fail(f"a memo of at most {_MAX_MEMO_INDEX} values", f"index {index}")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.fail("a value of the memo", f"index {index}, which holds none")
        self.push(self.memo[index])

    # -- objects

    def push_global(self, module: str, name: str) -> None:
        kind = _GLOBALS.get((module, name))
        if kind is None:
            text = f"{module}.{name}"  # escaped where it could drive a terminal
            found = f"the global {text if text.isprintable() else repr(text)}; refused"
            if (module, name) == ("_codecs", "encode"):
                found += ", as protocols below 3 store no plain bytes: save the file again with protocol 4"
            raise self.fail("only the globals of a numpy array", found)
        self.push(_Global(kind))

    def call(self) -> None:
        args = self.pop(_Tuple)
        match self.pop(_Global).kind, args:
            case "reconstruct", (_Global("ndarray"), (0,), _Bytes(_, 1, False, b"b")):
                self.push(_Array())
            case "frombuffer", (data, dtype, shape, "C" | "F" as order):
                self.push(_Array(self.array(shape, dtype, order == "F", data)))
            case "dtype", (_Global("bfloat16"), False, True):
                self.push(_DType(_BF16))
            case "dtype", (str(name), False, True):
                if name not in _DTYPES:
                    raise self.fail(f"a dtype of {', '.join(sorted(_DTYPES))} or bfloat16", repr(name))
                self.push(_DType(_DTYPES[name]))
            case kind, _ if kind in _CALLS:
                raise self.fail(_CALLS[kind], "other arguments")
            case kind, _:
                raise self.fail("a call of _reconstruct, _frombuffer or dtype", f"a call of {kind}")

    def new_object(self) -> None:
        args, kind = self.pop(_Tuple), self.pop(_Global).kind
        if args or kind != "quantized":
            raise self.fail("a new QuantizedWeight8bit", f"a new {kind}" + (" with arguments" if args else ""))
        self.push(_Object())

    def set_items(self, items: list[Any]) -> None:
        target = self.check(self.top(), dict)
        if len(items) % 2:
            raise self.fail("keys with values", f"{len(items)} items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if self.check(key, str) not in ("weight", "scales"):
                raise self.fail("the attributes weight and scales", repr(key))
            target[key] = value

    def build(self) -> None:
        state, target = self.pop(), self.top()
        match target, state:
            case _DType(built=False), (3, str(order), None, None, None, size, alignment, flags):
                if order not in (("<", "|") if target.dtype.itemsize == 1 else ("<",)):
                    raise self.fail("little-endian numbers", f"byte order {order!r}")
                # A registered dtype states its size and alignment, and flags about how Python reads an item of it.
                sizes, known = ((2, 2), (0x40, 0x60, 0x70)) if target.dtype == _BF16 else ((-1, -1), (0,))
                if (size, alignment) != sizes or flags not in known:
                    raise self.fail(f"the state of {target.dtype.name}", "another size, alignment or flags")
                target.built = True
            case _DType(built=False), _:
                raise self.fail("version 3 of the state of a plain dtype", "another")
            case _Array(place=None), (1, shape, dtype, bool(fortran), data):
                if self.check(data, _Bytes).mutable:
                    raise self.fail("a byte string", "a bytearray")
                target.place = self.array(shape, dtype, fortran, data)
            case _Array(place=None), _:
                raise self.fail("version 1 of an array's state", "another")
            case _Object(attributes=None), _:
                target.attributes = dict(self.check(state, dict))
            case _:
                raise self.fail(
                    "a new array, dtype or object to fill", _KINDS[type(target)] + ", or one already filled"
                )

    def array(self, shape: Any, dtype: Any, fortran: bool, data: Any) -> ArrayPlace:
        dims, place = self.check(shape, _Tuple), self.check(data, _Bytes)
        if len(dims) > _MAX_DIMENSIONS:
            raise self.fail(f"at most {_MAX_DIMENSIONS} dimensions", f"{len(dims)}")
        if not self.check(dtype, _DType).built:
            raise self.fail("a dtype with its byte order", "none yet")
        for n in dims:
            if self.check(n, int) < 1:
                raise self.fail("a shape of positive lengths", f"length {n}")
        nbytes = prod(dims) * dtype.dtype.itemsize
        if place.length != nbytes:
            text = ", ".join(map(str, dims))
            raise self.fail(f"{nbytes} bytes for ({text}) {dtype.dtype.name}", f"{place.length} bytes")
        return ArrayPlace(tuple(dims), dtype.dtype, place.offset, nbytes, fortran)

    def stack_global(self) -> None:
        name, module = self.pop(str), self.pop(str)
        self.push_global(module, name)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def tuple_of(self, count: int) -> None:
        self.push_tuple([self.pop() for _ in range(count)][::-1])

    def long(self) -> None:
        if (n := self.number(1)) > 8:
            raise self.fail("an integer of at most 8 bytes", f"one of {n}")
        self.push(self.number(n, signed=True))


_OPCODES: dict[bytes, Callable[[Machine], None]] = {
    b"\x95": Machine.frame,
    b"(": lambda m: m.push(_MARK),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number(4, signed=True)),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"\x8a": Machine.long,
    b"\x8c": lambda m: m.push(m.text(1)),
    b"X": lambda m: m.push(m.text(4)),
    b"\x8d": lambda m: m.push(m.text(8)),
    b"C": lambda m: m.push(m.place(1)),
    b"B": lambda m: m.push(m.place(4)),
    b"\x8e": lambda m: m.push(m.place(8)),
    b"\x96": lambda m: m.push(m.place(8, mutable=True)),
    b"\x94": lambda m: m.memoize(len(m.memo)),
    b"q": lambda m: m.memoize(m.number(1)),
    b"r": lambda m: m.memoize(m.number(4)),
    b"h": lambda m: m.recall(m.number(1)),
    b"j": lambda m: m.recall(m.number(4)),
    b"c": lambda m: m.push_global(m.line(), m.line()),
    b"\x93": Machine.stack_global,
    b")": lambda m: m.push_tuple([]),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": lambda m: m.push_tuple(m.popped_to_mark()),
    b"}": lambda m: m.push({}),
    b"s": Machine.set_item,
    b"u": lambda m: m.set_items(m.popped_to_mark()),
    b"R": Machine.call,
    b"\x81": Machine.new_object,
    b"b": Machine.build,
}
