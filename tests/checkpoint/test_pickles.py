from __future__ import annotations

import ast
import itertools
import os
import pickle
import resource
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grok_engine.checkpoint
from grok_engine.checkpoint.base import CheckpointError
from grok_engine.checkpoint.xai.pickle_machine import Machine
from grok_engine.checkpoint.xai.pickle_writer import pickle_pieces, write_pickle
from grok_engine.checkpoint.xai.pickles import map_pickle, read_header
from tests.checkpoint.sparse import hollow, write_hollow

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core.*:DeprecationWarning")
BF16 = np.dtype(ml_dtypes.bfloat16)
Judge = Callable[[bytes], tuple[Any, Any]]


def same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def values(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.asarray(np.arange(np.prod(shape), dtype=np.int64).reshape(shape) % 251 - 125).astype(dtype)


# ---- what it reads


def test_every_golden_value_equals_pickles(golden: Path, unpickled: Judge) -> None:
    files = sorted((golden / "ckpt-0").iterdir())
    assert len(files) > 10
    for file in files:
        weight, scales = unpickled(file.read_bytes())
        mapped = map_pickle(file)
        assert same(mapped.weight, weight), file
        assert same(mapped.scales, scales), file


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("shape", [(1,), (5, 3), (2, 300, 70), (), (2, 1, 2, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.int8, BF16, np.float64, np.uint16])
@pytest.mark.parametrize("order", ["C", "F"])
def test_bare_arrays(tmp_path: Path, protocol: int, shape: tuple[int, ...], dtype: Any, order: Any) -> None:
    array = np.array(values(shape, dtype), order=order)
    for a in (array, np.frombuffer(array.tobytes(), dtype).reshape(shape)):  # writable and not: two forms in protocol 5
        mapped = map_pickle(written(tmp_path / "t", pickle.dumps(a, protocol)))
        assert same(mapped.weight, a)
        assert mapped.scales is None


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_quantised_objects(tmp_path: Path, protocol: int, quantized: Any) -> None:
    weight, scales = values((2, 64, 300), np.int8), values((2, 8, 300), BF16)
    mapped = map_pickle(written(tmp_path / "t", pickle.dumps(quantized(weight, scales), protocol)))
    assert same(mapped.weight, weight)
    assert same(mapped.scales, scales)


def test_older_flags_of_bfloat16_are_accepted(tmp_path: Path) -> None:
    data = pickle.dumps(values((4, 3), BF16), 4)
    assert data.count(b"K\x02K\x02K\x40") == 1
    mapped = map_pickle(written(tmp_path / "t", data.replace(b"K\x02K\x02K\x40", b"K\x02K\x02K\x70")))
    assert same(mapped.weight, values((4, 3), BF16))


def test_views_are_private_writable_and_outlive_the_call(tmp_path: Path) -> None:
    file = tmp_path / "t"
    write_pickle(file, values((64, 64), np.float32), None)
    before = file.read_bytes()
    mapped = map_pickle(file)
    assert not mapped.weight.flags.owndata
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = torch.from_numpy(mapped.weight)
    t[0, 0] = 7.0
    assert mapped.weight[0, 0] == 7.0
    assert file.read_bytes() == before


def test_the_mapping_goes_with_its_arrays(tmp_path: Path) -> None:
    file = tmp_path / "some tensor"
    write_pickle(file, values((64, 64), np.float32), None)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    mapped = map_pickle(file)
    assert "some tensor" in maps.read_text()
    del mapped
    assert "some tensor" not in maps.read_text()


def test_a_header_costs_no_data(tmp_path: Path) -> None:
    file = tmp_path / "t"
    shape = (8, 40000, 40000)  # 12.8 GB: past the 4-byte lengths
    with file.open("wb") as f:
        write_hollow(f, pickle_pieces(hollow(shape, np.int8), hollow((8, 1, 40000), BF16)))
    header = read_header(file)
    assert header.weight.shape == shape
    assert header.weight.nbytes == 12_800_000_000
    assert header.file_size > header.weight.nbytes
    assert header.scales is not None
    assert header.scales.offset > header.weight.offset + header.weight.nbytes


# ---- what it writes


def test_the_writer_makes_the_goldens_bytes(golden: Path, tmp_path: Path) -> None:
    for file in sorted((golden / "ckpt-0").iterdir()):
        mapped = map_pickle(file)
        copy = tmp_path / file.name
        assert write_pickle(copy, mapped.weight, mapped.scales) == file.stat().st_size
        assert copy.read_bytes() == file.read_bytes(), file


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), max_size=4),
    st.sampled_from([np.float32, np.int8, BF16]),
    st.one_of(st.none(), st.integers(1, 40000)),
)
def test_the_writer_agrees_with_pickle(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: Any, long: int | None
) -> None:
    array = values((*shape[:2], long) if long else tuple(shape), dtype)
    file = tmp_path_factory.getbasetemp() / "writer"
    write_pickle(file, array, None)
    ours, theirs = file.read_bytes(), pickle.dumps(array, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert same(pickle.loads(ours), array)
    if b"numpy._core" in theirs:  # numpy 2 names the module with one character more
        (frame,) = struct.unpack("<Q", ours[3:11])
        rest = ours[11:].replace(b"\x15numpy.core.", b"\x16numpy._core.", 1)
        ours = ours[:3] + struct.pack("<Q", frame + 1) + rest
    assert ours == theirs


def test_transposed_weights_are_written_in_c_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grok_engine.checkpoint.xai.pickle_writer._CHUNK", 100)
    for array in (
        values((30, 20), np.float32).T,
        values((3, 40, 5), np.int8).transpose(0, 2, 1),
        np.arange(400.0)[::2],
    ):
        array = array.astype(np.float32, copy=False) if array.dtype == np.float64 else array
        write_pickle(tmp_path / "t", array, None)
        assert same(map_pickle(tmp_path / "t").weight, array)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grok_engine.checkpoint.xai.pickle_writer._stream", full)
    with pytest.raises(OSError, match="No space"):
        write_pickle(tmp_path / "t", values((4, 4), np.int8), None)
    assert list(tmp_path.iterdir()) == []


# ---- what it refuses


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def string(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def unframed(data: bytes) -> bytes:
    assert data[2:3] == b"\x95"
    return data[:2] + data[11:]


ARRAY = unframed(pickle.dumps(values((2, 3), np.float32), 4))
STATE = b"K\x01K\x02K\x03\x86"  # where the array's state begins
HOSTILE: dict[str, tuple[bytes, str]] = {
    "global": (b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R.", "os.system"),
    "stack global": (
        b"\x80\x04" + string("posix") + string("system") + b"\x93" + string("x") + b"\x85R.",
        "posix.system",
    ),
    "global of an attribute": (b"\x80\x04" + string("numpy") + string("load") + b"\x93.", "numpy.load"),
    "dotted global": (b"\x80\x04" + string("numpy") + string("ndarray.tofile") + b"\x93.", "numpy.ndarray.tofile"),
    "inst": (b"\x80\x02(ios\nsystem\n.", "os.system"),
    "inst of a known name": (b"\x80\x02(inumpy\nndarray\n.", "INST"),
    "obj": (b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00xo.", "os.system"),
    "obj of a known name": (b"\x80\x02(cnumpy\nndarray\nK\x01o.", "OBJ"),
    "newobj_ex": (b"\x80\x04" + string("subprocess") + string("Popen") + b"\x93)}\x92.", "subprocess.Popen"),
    "newobj_ex of a known name": (b"\x80\x04" + string("numpy") + string("ndarray") + b"\x93)}\x92.", "NEWOBJ_EX"),
    "ext1": (b"\x80\x02\x82\x07.", "EXT1 7"),
    "ext2": (b"\x80\x02\x83\x07\x01.", "EXT2 263"),
    "ext4": (b"\x80\x02\x84\x07\x00\x00\x00.", "EXT4 7"),
    "persid": (b"\x80\x02Psome id\n.", "PERSID 'some id'"),
    "binpersid": (b"\x80\x02K\x01Q.", "BINPERSID"),
    "in the state of build": (
        ARRAY.replace(STATE, string("posix") + string("system") + b"\x93" + string("x") + b"\x85R" + STATE),
        "posix.system",
    ),
    "a call of ndarray": (b"\x80\x04" + string("numpy") + string("ndarray") + b"\x93K\x02\x85R.", "a call of ndarray"),
    "a new ndarray": (b"\x80\x04" + string("numpy") + string("ndarray") + b"\x93)\x81.", "a new ndarray"),
    "python 2 name": (b"\x80\x02c__builtin__\neval\n.", "__builtin__.eval"),
    "terminal codes": (b"\x80\x02c\x1b[2J\nx\n.", "\\x1b[2J"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_opcodes_are_refused_by_name(tmp_path: Path, case: str) -> None:
    data, name = HOSTILE[case]
    file = written(tmp_path / "t", data)
    with pytest.raises(CheckpointError) as caught:
        map_pickle(file)
    text = str(caught.value)
    assert name in text
    assert str(file) in text
    assert "expected" in text
    assert "found" in text


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("where", ["alone", "weight", "scales", "state"])
@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr])
def test_a_call_is_refused_wherever_it_stands(
    tmp_path: Path, protocol: int, where: str, function: Any, quantized: Any
) -> None:
    trap = tmp_path / "sprung"
    call = Calls(function, f"open({str(trap)!r}, 'w')")
    array = values((2, 3), np.int8)
    value = {
        "alone": lambda: call,
        "weight": lambda: quantized(call, array),
        "scales": lambda: quantized(array, call),
        "state": lambda: np.array([call], dtype=object),
    }[where]()
    file = written(tmp_path / "t", pickle.dumps(value, protocol))
    with pytest.raises(CheckpointError) as caught:
        map_pickle(file)
    assert not trap.exists()
    module = "__builtin__" if protocol == 2 and function.__module__ == "builtins" else function.__module__
    if where in ("alone", "weight") or (where == "scales" and protocol > 2):
        assert f"found the global {module}.{function.__name__}; refused" in str(caught.value)
    else:  # these stop earlier, at bytes packed as text or at the dtype
        assert "_codecs.encode; refused" in str(caught.value) or "'O8'" in str(caught.value)


def test_protocol_2_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"_codecs\.encode.*protocol 4"):
        map_pickle(written(tmp_path / "t", pickle.dumps(values((2, 3), np.float32), 2)))


def test_nothing_here_imports_pickle() -> None:
    folder = Path(next(iter(grok_engine.checkpoint.__path__)))
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"pickle", "pickletools", "_pickle", "dill", "cloudpickle"}, (
                file
            )


def replaced(old: bytes, new: bytes) -> bytes:
    assert ARRAY.count(old) == 1, (old, ARRAY)
    return ARRAY.replace(old, new)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "found an empty file"),
    "text": (b"hello", "found first byte 0x68"),
    "protocol 0": (pickle.dumps([1], 0), "protocol 2 or later"),
    "protocol 6": (b"\x80\x06.", "protocol 6"),
    "half": (ARRAY[: len(ARRAY) // 2], "truncated"),
    "trailing": (ARRAY + b"x", "found 1 more bytes"),
    "two pickles": (ARRAY + ARRAY, f"found {len(ARRAY)} more bytes"),
    "a list": (pickle.dumps([1, 2], 4), "opcode 0x5d"),
    "a number": (pickle.dumps(5, 4), "found an integer"),
    "a dict": (pickle.dumps({}, 4), "found a dict"),
    "nothing": (b"\x80\x04.", "found none"),
    "shape of fewer bytes": (replaced(STATE, b"K\x01K\x02K\x02\x86"), "expected 16 bytes for (2, 2) float32, found 24"),
    "shape of more bytes": (replaced(STATE, b"K\x01K\x02K\x04\x86"), "expected 32 bytes for (2, 4) float32, found 24"),
    "negative shape": (replaced(STATE, b"K\x01J\xfe\xff\xff\xffJ\xfd\xff\xff\xff\x86"), "length -2"),
    "huge shape": (
        replaced(STATE, b"K\x01\x8a\x08" + b"\xff" * 7 + b"\x7f\x8a\x08" + b"\xff" * 7 + b"\x7f\x86"),
        "bytes for (",
    ),
    "shape of booleans": (replaced(STATE, b"K\x01\x88K\x06\x86"), "found a boolean"),
    "nine dimensions": (replaced(STATE, b"K\x01(" + b"K\x01" * 9 + b"t"), "found 9"),
    "big-endian": (replaced(b"\x8c\x01<", b"\x8c\x01>"), "little-endian"),
    "objects": (pickle.dumps(np.array([1]), 4).replace(b"\x8c\x02i8", b"\x8c\x02O8"), "'O8'"),
    "structured": (pickle.dumps(np.zeros(2, [("a", "i4")]), 4), "'V4'"),
    "strings": (pickle.dumps(np.array(["ab"]), 4), "'U2'"),
    "no elements": (pickle.dumps(np.zeros((0, 3), np.float32), 4), "length 0"),
    "a name that is too long": (b"\x80\x04X\xff\xff\xff\x7f.", "string of at most"),
    "a name that is not text": (b"\x80\x04\x8c\x01\xff.", "UTF-8"),
    "a name without end": (b"\x80\x02c" + b"a" * 5000, "longer"),
    "bytes past the end": (b"\x80\x04\x8e" + b"\xff" * 8, "truncated"),
    "a frame past the end": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.", "frame of 1099511627776"),
    "a long number": (b"\x80\x04\x8a\xff" + b"\x01" * 255 + b".", "integer of at most 8 bytes"),
    "an empty memo": (b"\x80\x04h\x00.", "index 0"),
    "a memo far out": (b"\x80\x04Nr\xff\xff\xff\xff.", "index 4294967295"),
    "a memo of nothing": (b"\x80\x04\x94.", "found none"),
    "no mark": (b"\x80\x04t.", "expected a mark"),
    "a mark in the way": (b"\x80\x04(\x85.", "found a mark"),
    "marks without end": (b"\x80\x04" + b"(" * 100_000, "stack"),
    "opcodes without end": (b"\x80\x04N" + b"\x94" * 100_000, "at most 1000 opcodes"),
    "deep tuples": (b"\x80\x04)" + b"\x85" * 100_000, "nested"),
    "doubling tuples": (b"\x80\x04)\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(90)) + b".", "nested"),
    "a dict of itself": (b"\x80\x04}\x94" + string("weight") + b"h\x00s.", "found a dict"),
    "a bytearray for bytes": (replaced(b"C\x18", b"\x96" + struct.pack("<Q", 24)), "found a bytearray"),
    "built twice": (ARRAY[:-1] + b"Nb.", "already filled"),
    "two values": (ARRAY[:2] + b"N" + ARRAY[2:], "one value at the end"),
    "never built": (ARRAY[: ARRAY.index(b"R\x94(") + 2] + b".", "contents of the array"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("read", [map_pickle, read_header])
def test_damaged_files_give_one_clear_error(tmp_path: Path, case: str, read: Callable[[Path], Any]) -> None:
    data, text = DAMAGED[case]
    file = written(tmp_path / "t", data)
    with pytest.raises(CheckpointError) as caught:
        read(file)
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{file}: expected ")
    assert len(str(caught.value)) < 600 + len(str(file))


def test_an_object_with_other_attributes(tmp_path: Path, quantized: Any) -> None:
    bare = quantized(values((2, 3), np.int8), values((1, 3), BF16))
    del bare.scales
    with pytest.raises(CheckpointError, match="weight and scales, found weight"):
        map_pickle(written(tmp_path / "t", pickle.dumps(bare, 4)))
    bare.bias = bare.weight
    with pytest.raises(CheckpointError, match="'bias'"):
        map_pickle(written(tmp_path / "t", pickle.dumps(bare, 4)))


def test_other_things_than_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "absent"):
        with pytest.raises(CheckpointError, match="expected a re"):
            map_pickle(tmp_path / name)


def test_every_truncation_is_found(tmp_path: Path, quantized: Any) -> None:
    data = pickle.dumps(quantized(values((4, 8), np.int8), values((2, 8), BF16)), 4)
    for end in range(len(data)):
        with pytest.raises(CheckpointError):
            read_header(written(tmp_path / "t", data[:end]))


# ---- what it makes of noise


def _seeds() -> list[bytes]:
    from tests.checkpoint.conftest import QuantizedWeight8bit

    seeds = [pickle.dumps(values((2, 3), d), p) for d, p in itertools.product((np.float32, np.int8, BF16), (3, 4, 5))]
    seeds.append(pickle.dumps(np.asfortranarray(values((2, 3), np.float32)), 5))
    pieces = pickle_pieces(hollow((4, 8), np.int8), hollow((2, 8), BF16))
    seeds.append(b"".join(p if isinstance(p, bytes) else bytes(range(p.nbytes)) for p in pieces))
    assert QuantizedWeight8bit.__module__ == "__main__"
    return [*seeds, *(unframed(s) for s in seeds if s[1] >= 4)]


SEEDS = _seeds()
OPCODES = [bytes([i]) for i in range(256)] + [
    b"K\x01",
    b"h\x00",
    b"h\x03",
    b"K\x02\x85",
    b"\x8c\x01<",
    b"N",
    b"0",
    b"2",
]
edit = st.tuples(
    st.sampled_from(["set", "insert", "delete", "repeat", "cut"]), st.integers(0), st.sampled_from(OPCODES)
)


def mutated(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, where, code in edits:
        at = where % (len(data) + 1)
        if kind == "set":
            data = data[:at] + code + data[at + len(code) :]
        elif kind == "insert":
            data = data[:at] + code + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + 1 :]
        elif kind == "repeat":
            data = data[:at] + data[max(0, at - 7) : at] + data[at:]
        elif where % 5 == 0:
            data = data[:at]
    return data


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SEEDS), st.lists(edit, max_size=3))
def test_mutated_files_never_surprise(
    tmp_path: Path, unpickled: Judge, data: bytes, edits: list[tuple[str, int, bytes]]
) -> None:
    data = mutated(data, edits)
    file = written(tmp_path / "t", data)
    try:
        mapped = map_pickle(file)
    except CheckpointError:
        return
    # Whatever we accept is harmless to unpickle: nothing in it but numpy's own reconstruction.
    weight, scales = unpickled(data)
    assert same(mapped.weight, weight)
    assert same(mapped.scales, scales)


def test_every_single_byte_change(tmp_path: Path, unpickled: Judge) -> None:
    accepted = 0
    file = tmp_path / "t"
    seed = SEEDS[10]
    for at in range(len(seed)):
        for new in (0, 1, 0x28, 0x2E, 0x63, 0x94, 0xFF, seed[at] ^ 1, seed[at] ^ 0x80):
            data = seed[:at] + bytes([new]) + seed[at + 1 :]
            try:
                mapped = map_pickle(written(file, data))
            except CheckpointError:
                continue
            accepted += 1
            weight, scales = unpickled(data)
            assert same(mapped.weight, weight), (at, new)
            assert same(mapped.scales, scales), (at, new)
    assert 100 < accepted < len(seed) * 9  # changes of the data itself are no errors, those of the rest mostly are


def test_memory_stays_flat_on_a_bomb(tmp_path: Path) -> None:
    file = written(tmp_path / "t", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 33))
    os.truncate(file, (1 << 33) + 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with file.open("rb") as f, pytest.raises(ValueError, match="opcode"):
        Machine(f, file.stat().st_size).run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
