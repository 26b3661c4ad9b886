"""A safetensors file that strangers wrote is read as the library reads it, or is one CheckpointError."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.checkpoint.safetensors import SafetensorsFile
from grok_engine.checkpoint.strict_json import MAX_BYTES


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(**change: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}


def test_every_dtype_is_read_as_it_was_written(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randn(3, 5, generator=rng).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8)
    }
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "x", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "x")
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.double(), tensor.double())


@pytest.mark.parametrize("before", range(8))
def test_floats_lie_at_whole_addresses_and_writing_to_them_changes_no_file(before: int, tmp_path: Path) -> None:
    """Whatever comes before them in the file; kernels read vectors."""
    header = {"a": entry(dtype="U8", shape=[before], data_offsets=[0, before])}
    header["b"] = entry(data_offsets=[before, before + 8])
    data = bytes(before) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    path = write(tmp_path / "x", header, data)
    found = SafetensorsFile(path).read("b")
    assert found.tolist() == [1.5, -2.0]
    assert found.data_ptr() % 4 == 0
    found.fill_(3.0)
    assert path.read_bytes().endswith(data)


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("empty", lambda p: p.write_bytes(b""), "length of a header within 0 bytes"),
    ("short", lambda p: p.write_bytes(b"\x05"), "length of a header within 1 bytes"),
    ("length-beyond-file", lambda p: write(p, {}, length=1 << 62), "found 4611686018427387904"),
    ("not-json", lambda p: write(p, b"{'a': 1}"), "not valid JSON"),
    ("not-utf8", lambda p: write(p, b'{"\xff": 1}'), "not valid JSON"),
    ("list", lambda p: write(p, []), "holds a list, expected an object"),
    ("nested", lambda p: write(p, b"[" * 200_000), "too deeply nested"),
    ("twice", lambda p: write(p, b'{"a": {}, "a": {}}'), "key 'a' stands twice"),
    ("metadata-null", lambda p: write(p, {"__metadata__": None}), "__metadata__ to map text to text"),
    ("metadata-list", lambda p: write(p, {"__metadata__": []}), "__metadata__ to map text to text"),
    ("metadata-number", lambda p: write(p, {"__metadata__": {"a": 1}}), "__metadata__ to map text to text"),
    ("no-entry", lambda p: write(p, {"a": 5}), "dtype, shape and data_offsets of a, found 5"),
    ("more-keys", lambda p: write(p, {"a": entry(x=1)}), "dtype, shape and data_offsets of a"),
    ("dtype", lambda p: write(p, {"a": entry(dtype="F4")}, bytes(8)), "a has dtype 'F4', expected one of"),
    ("dtype-list", lambda p: write(p, {"a": entry(dtype=["F32"])}, bytes(8)), r"a has dtype \['F32'\]"),
    ("shape-true", lambda p: write(p, {"a": entry(shape=[2, True])}, bytes(8)), r"shape \[2, True\]"),
    ("shape-negative", lambda p: write(p, {"a": entry(shape=[-1, -2])}, bytes(8)), r"shape \[-1, -2\]"),
    ("shape-float", lambda p: write(p, {"a": entry(shape=[2.0])}, bytes(8)), r"shape \[2.0\]"),
    ("shape-huge", lambda p: write(p, {"a": entry(shape=[2**62, 2**62])}, bytes(8)), "a has 8 bytes, expected 8507"),
    ("shape-digits", lambda p: write(p, {"a": entry(shape=[10**400])}, bytes(8)), "beyond 64 bits"),
    ("offsets-float", lambda p: write(p, {"a": entry(data_offsets=[0.0, 8])}, bytes(8)), r"data_offsets \[0.0, 8\]"),
    ("offsets-three", lambda p: write(p, {"a": entry(data_offsets=[0, 8, 9])}, bytes(9)), r"data_offsets \[0, 8, 9\]"),
    ("bytes", lambda p: write(p, {"a": entry(data_offsets=[0, 4])}, bytes(4)), "a has 4 bytes, expected 8 for F32"),
    ("hole", lambda p: write(p, {"a": entry(data_offsets=[4, 12])}, bytes(12)), "a at byte 0 of the data"),
    ("overlap", lambda p: write(p, {"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)), "b at byte 8"),
    ("truncated", lambda p: write(p, {"a": entry()}, bytes(7)), "expected .* bytes by its header, found"),
    ("trailing", lambda p: write(p, {"a": entry()}, bytes(9)), "expected .* bytes by its header, found"),
    ("folder", lambda p: p.mkdir(), "expected a regular file"),
    ("pipe", lambda p: os.mkfifo(p), "expected a regular file"),
    ("dangling", lambda p: p.symlink_to("nowhere"), "expected a regular file"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_wrong_file_is_one_error(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte, whose header would fill it."""
    with (tmp_path / "x").open("wb") as file:
        file.write((MAX_BYTES + 1).to_bytes(8, "little"))
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=f"found {MAX_BYTES + 1}"):
        SafetensorsFile(tmp_path / "x")


def test_a_file_that_shrank_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    """Reading beyond its end would end the process."""
    path = write(tmp_path / "x", {"a": entry()}, bytes(8))
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="bytes as when opened, found"):
        file.read("a")
