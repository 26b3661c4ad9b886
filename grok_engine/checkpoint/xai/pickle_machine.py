"""The stack machine that evaluates a pickle of arrays over descriptions, see `pickles`.

A byte string becomes its place in the file, a global becomes its name; nothing is imported, called or copied.
Every quantity that a file could make large is bounded: opcodes, stack, memo, nesting, lengths of names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
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


@dataclass(slots=True, eq=False)
class _Tuple:
    # A class of its own, because two nested tuples of the memo compare in exponential time.
    items: list[Any]
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

# Refused with their names, since these are how a pickle reaches for code.
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
_WINDOW = 512


class Machine:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.at = 0
        self.opcode_at = 0
        self.window = b""
        self.window_at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    # -- bytes

    def fail(self, expected: str, found: str) -> PickleError:
        return PickleError(f"expected {expected}, found {found} (opcode at byte {self.opcode_at} of {self.size})")

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise self.fail(f"{what} of {n} bytes", f"the end of the file after {self.size - self.at}: truncated")
        start = self.at - self.window_at
        if start < 0 or start + n > len(self.window):
            self.window_at, start = self.at, 0
            self.window = os.pread(self.file.fileno(), max(n, _WINDOW), self.at)
            if len(self.window) < n:
                raise self.fail(f"{what} of {n} bytes", f"{len(self.window)}: the file shrinks while it is read")
        self.at += n
        return self.window[start : start + n]

    def number(self, n: int, what: str = "a number", *, signed: bool = False) -> int:
        return int.from_bytes(self.take(n, what), "little", signed=signed)

    def place(self, length_bytes: int, *, mutable: bool = False) -> _Bytes:
        length = self.number(length_bytes, "the length of a byte string")
        if length > self.size - self.at:
            raise self.fail(
                f"a byte string of {length} bytes", f"the end of the file after {self.size - self.at}: truncated"
            )
        place = _Bytes(self.at, length, mutable)
        self.at += length
        return place

    def text(self, length_bytes: int) -> str:
        length = self.number(length_bytes, "the length of a string")
        if length > _MAX_TEXT:
            raise self.fail(f"a string of at most {_MAX_TEXT} bytes", f"one of {length}")
        return self.decode(self.take(length, "a string"))

    def line(self) -> str:
        line = bytearray()
        while (byte := self.take(1, "the name of a global")) != b"\n":
            line += byte
            if len(line) > _MAX_TEXT:
                raise self.fail(f"a name of at most {_MAX_TEXT} bytes", "a longer one")
        return self.decode(bytes(line))

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
        if not self.stack:
            raise self.fail("a value on the stack", "none")
        value = self.stack.pop()
        if value is _MARK:
            raise self.fail("a value on the stack", "a mark")
        return value if kind is None else self.check(value, kind)

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def check(self, value: Any, kind: type) -> Any:
        if type(value) is not kind:
            raise self.fail(_KINDS[kind], _KINDS[type(value)])
        return value

    def popped_to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise self.fail("a mark on the stack", "none")

    def make_tuple(self, items: list[Any]) -> None:
        depth = 1 + max((x.depth for x in items if type(x) is _Tuple), default=0)
        if depth > _MAX_NESTING:
            raise self.fail(f"tuples nested at most {_MAX_NESTING} deep", "deeper ones")
        self.push(_Tuple(items, depth))

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

    def unpack(self, value: Any, count: int, what: str) -> list[Any]:
        items: list[Any] = self.check(value, _Tuple).items
        if len(items) != count:
            raise self.fail(f"{what} of {count} values", f"{len(items)}")
        return items

    def call(self) -> None:
        args = self.pop(_Tuple)
        kind = self.pop(_Global).kind
        if kind == "reconstruct":
            cls, shape, code = self.unpack(args, 3, "the arguments of _reconstruct")
            empty = self.check(shape, _Tuple).items
            code = self.check(code, _Bytes)
            exact = self.check(cls, _Global).kind == "ndarray" and len(empty) == 1 and _is_int(empty[0], 0)
            if not exact or code.mutable or code.length != 1 or os.pread(self.file.fileno(), 1, code.offset) != b"b":
                raise self.fail("_reconstruct(ndarray, (0,), b'b')", "other arguments")
            self.push(_Array())
        elif kind == "frombuffer":
            data, dtype, shape, order = self.unpack(args, 4, "the arguments of _frombuffer")
            order = self.check(order, str)
            if order not in ("C", "F"):
                raise self.fail("an array in order C or F", f"order {order!r}")
            self.push(_Array(self.array(shape, dtype, order == "F", data)))
        elif kind == "dtype":
            what, align, copy = self.unpack(args, 3, "the arguments of dtype")
            if align is not False or copy is not True:
                raise self.fail("dtype(..., False, True)", "other arguments")
            if type(what) is _Global and what.kind == "bfloat16":
                self.push(_DType(_BF16))
            elif (name := self.check(what, str)) in _DTYPES:
                self.push(_DType(_DTYPES[name]))
            else:
                raise self.fail(f"a dtype of {', '.join(sorted(_DTYPES))} or bfloat16", repr(name))
        else:
            raise self.fail("a call of _reconstruct, _frombuffer or dtype", f"a call of {kind}")

    def new_object(self) -> None:
        self.unpack(self.pop(), 0, "the arguments of a new object")
        if (kind := self.pop(_Global).kind) != "quantized":
            raise self.fail("a new QuantizedWeight8bit", f"a new {kind}")
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
        if type(target) is _DType and not target.built:
            self.build_dtype(target, state)
        elif type(target) is _Array and target.place is None:
            version, shape, dtype, fortran, data = self.unpack(state, 5, "the state of an array")
            if not _is_int(version, 1):
                raise self.fail("version 1 of an array's state", "another")
            if self.check(data, _Bytes).mutable:
                raise self.fail("a byte string", "a bytearray")
            target.place = self.array(shape, dtype, self.check(fortran, bool), data)
        elif type(target) is _Object and target.attributes is None:
            target.attributes = dict(self.check(state, dict))
        else:
            raise self.fail("a new array, dtype or object to fill", _KINDS[type(target)] + ", or one already filled")

    def build_dtype(self, target: _DType, state: Any) -> None:
        version, order, *nothing, size, alignment, flags = self.unpack(state, 8, "the state of a dtype")
        if not _is_int(version, 3):
            raise self.fail("version 3 of a dtype's state", "another")
        if self.check(order, str) not in (("<", "|") if target.dtype.itemsize == 1 else ("<",)):
            raise self.fail("little-endian numbers", f"byte order {order!r}")
        if any(x is not None for x in nothing):
            raise self.fail("a dtype of plain numbers", "one with fields or a sub-array")
        # A registered dtype states its size and alignment, and flags about how Python reads an item of it.
        own = target.dtype.itemsize
        plain = _is_int(size, -1) and _is_int(alignment, -1) and _is_int(flags, 0)
        registered = (
            _is_int(size, own) and _is_int(alignment, own) and type(flags) is int and flags in (0x40, 0x60, 0x70)
        )
        if not (registered if target.dtype == _BF16 else plain):
            raise self.fail(f"the state of {target.dtype.name}", "another size, alignment or flags")
        target.built = True

    def array(self, shape: Any, dtype: Any, fortran: bool, data: Any) -> ArrayPlace:
        dims = self.check(shape, _Tuple).items
        if len(dims) > _MAX_DIMENSIONS:
            raise self.fail(f"at most {_MAX_DIMENSIONS} dimensions", f"{len(dims)}")
        described = self.check(dtype, _DType)
        if not described.built:
            raise self.fail("a dtype with its byte order", "none yet")
        nbytes: int = described.dtype.itemsize
        for n in dims:
            if self.check(n, int) < 1:
                raise self.fail("a shape of positive lengths", f"length {n}")
            nbytes *= n
        place = self.check(data, _Bytes)
        if place.length != nbytes:
            text = ", ".join(map(str, dims))
            raise self.fail(f"{nbytes} bytes for ({text}) {described.dtype.name}", f"{place.length} bytes")
        return ArrayPlace(tuple(dims), described.dtype, place.offset, nbytes, fortran)

    # -- the program

    def run(self) -> tuple[ArrayPlace, ArrayPlace | None]:
        if self.size == 0:
            raise self.fail("a pickle", "an empty file")
        if (first := self.take(1, "a pickle")) != b"\x80":
            raise self.fail("a pickle of protocol 2 or later", f"first byte 0x{first.hex()}")
        if not 2 <= (protocol := self.number(1, "the protocol")) <= 5:
            raise self.fail("a pickle of protocol 2 to 5", f"protocol {protocol}")
        for _ in range(_MAX_OPCODES):
            self.opcode_at = self.at
            code = self.take(1, "an opcode")
            if code == b".":
                return self.result()
            self.step(code)
        raise self.fail(f"at most {_MAX_OPCODES} opcodes", "more")

    def step(self, code: bytes) -> None:
        handler = _OPCODES.get(code)
        if handler is not None:
            handler(self)
            return
        name = _REFUSED.get(code)
        if name == "INST":
            self.push_global(self.line(), self.line())
        if name in ("EXT1", "EXT2", "EXT4"):
            name += f" {self.number(int(name[-1]), 'an extension code')}"
        if name == "PERSID":
            name += f" {self.line()!r}"
        raise self.fail(
            "the opcodes of a numpy array", f"opcode 0x{code.hex()}" + (f", {name}; refused" if name else "")
        )

    def frame(self) -> None:
        length = self.number(8, "the length of a frame")
        if length > self.size - self.at:
            raise self.fail(f"a frame of {length} bytes", f"the end of the file after {self.size - self.at}: truncated")

    def result(self) -> tuple[ArrayPlace, ArrayPlace | None]:
        value = self.pop()
        if self.stack:
            raise self.fail("one value at the end", f"{len(self.stack)} more")
        if self.at != self.size:
            raise self.fail("the end of the file", f"{self.size - self.at} more bytes")
        if type(value) is _Array:
            return self.filled("the array", value), None
        attributes = self.check(value, _Object).attributes or {}
        if set(attributes) != {"weight", "scales"}:
            found = ", ".join(sorted(attributes)) or "neither"
            raise self.fail("the attributes weight and scales", found)
        return self.filled("weight", attributes["weight"]), self.filled("scales", attributes["scales"])

    def filled(self, what: str, value: Any) -> ArrayPlace:
        place: ArrayPlace | None = self.check(value, _Array).place
        if place is None:
            raise self.fail(f"the contents of {what}", "none")
        return place


def _is_int(value: Any, expected: int) -> bool:
    return type(value) is int and value == expected


def _stack_global(m: Machine) -> None:
    name, module = m.pop(str), m.pop(str)
    m.push_global(module, name)


def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items([key, value])


def _tuple_of(count: int) -> Any:
    return lambda m: m.make_tuple([m.pop() for _ in range(count)][::-1])


def _long1(m: Machine) -> None:
    if (n := m.number(1)) > 8:
        raise m.fail("an integer of at most 8 bytes", f"one of {n}")
    m.push(m.number(n, signed=True))


_OPCODES: dict[bytes, Any] = {
    b"\x95": Machine.frame,
    b"(": lambda m: m.push(_MARK),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number(4, signed=True)),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"\x8a": _long1,
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
    b"\x93": _stack_global,
    b")": lambda m: m.make_tuple([]),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"t": lambda m: m.make_tuple(m.popped_to_mark()),
    b"}": lambda m: m.push({}),
    b"s": _set_item,
    b"u": lambda m: m.set_items(m.popped_to_mark()),
    b"R": Machine.call,
    b"\x81": Machine.new_object,
    b"b": Machine.build,
}
