"""What is wrong in a GGUF file is one CheckpointError that says so, and takes neither time nor memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from grok_engine import LLM
from grok_engine.checkpoint.base import CheckpointError
from grok_engine.checkpoint.gguf import header
from grok_engine.checkpoint.gguf.header import read_header
from grok_engine.cli import main
from grok_engine.loading.resolve import read_config
from tests.checkpoint import gguf_models as models
from tests.checkpoint.test_gguf import write_stored

# Headers, byte by byte


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(keys: Sequence[bytes], tensors: Sequence[bytes] = (), **start: Any) -> bytes:
    """A file of these, and 64 bytes of data. start: another magic number, version, or counts of tensors and keys."""
    head = start.get("magic", b"GGUF") + struct.pack("<I", start.get("version", 3))
    head += struct.pack("<QQ", *start.get("counts", (len(tensors), len(keys)))) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32 + 64)


U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
HUGE = struct.pack("<Q", 2**63)
ALIGNMENT = "general.alignment"

HEADERS: dict[str, tuple[bytes, str]] = {
    "magic": (file([], magic=b"GGML"), "begins with b'GGUF', found b'GGML'"),
    "short": (b"GGUF\3\0\0\0", "at least 24 bytes, found 8"),
    "version": (file([], version=1), "version 2 or 3, found 1"),
    "endian": (file([], version=3 << 24), "big-endian, which is not read"),
    "keys": (file([], counts=(0, 2**63)), f"at most 4096 keys and 262144 tensors, found counts of {2**63} and 0"),
    "tensors": (file([], counts=(2**63, 0)), f"found counts of 0 and {2**63}"),
    "fewer keys": (file([], counts=(0, 100)), "key '' is there twice"),
    "twice": (file([key("a", U32, bytes(4))] * 2), "key 'a' is there twice"),
    "key length": (file([HUGE]), f"a key is {2**63} bytes long, expected at most 1024"),
    "key text": (file([text(b"\xff\xfe") + bytes(8)]), "a key is not UTF-8"),
    "type": (file([key("a", 13, bytes(8))]), "key 'a' holds values of type 13"),
    "bool": (file([key("a", BOOL, b"\2")]), "holds the boolean 2"),
    "string length": (file([key("a", STRING, HUGE)]), f"the value of 'a' is {2**63} bytes long"),
    "string end": (file([key("a", STRING, struct.pack("<Q", 10**6))]), "1000000 bytes are needed"),
    "array length": (file([key("a", ARRAY, struct.pack("<I", U32) + HUGE)]), f"{2**63} elements, expected at most"),
    "array end": (file([key("a", ARRAY, struct.pack("<IQ", U32, 10**6))]), "4000000 bytes are needed"),
    "strings": (file([key("a", ARRAY, struct.pack("<IQ", STRING, 10**6))]), "bytes are needed"),
    "strings length": (file([key("a", ARRAY, struct.pack("<IQ", STRING, 1) + HUGE)]), "bytes are needed"),
    "strings text": (file([key("a", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff"))]), "is not UTF-8"),
    "nested": (file([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50)]), "holds arrays in an array"),
    "alignment 0": (file([key(ALIGNMENT, U32, bytes(4))]), "is 0, expected a power of two"),
    "alignment 48": (file([key(ALIGNMENT, U32, struct.pack("<I", 48))]), "is 48, expected a power of two"),
    "alignment type": (file([key(ALIGNMENT, STRING, text("32"))]), "is '32', expected a power of two"),
    "rank 0": (file([], [tensor("t", ())]), "rank 0, expected 1 to 4"),
    "rank 5": (file([], [tensor("t", (1,) * 5)]), "rank 5, expected 1 to 4"),
    "size 0": (file([], [tensor("t", (4, 0))]), r"shape \(0, 4\), expected positive sizes"),
    "size": (file([], [tensor("t", (2**63, 2**63))]), "of a file of"),
    "columns": (file([], [tensor("t", (33,), 8)]), "a multiple of 32 columns for Q8_0"),
    "tensor type": (file([], [tensor("t", (256,), 10)]), "'t' is Q2_K, expected one of F32, F16, Q4_0"),
    "tensor type number": (file([], [tensor("t", (256,), 99)]), "an unknown type, 99"),
    "offset": (file([], [tensor("t", (4,), offset=8)]), "lies at 8, expected a multiple of the alignment 32"),
    "gap": (file([], [tensor("t", (4,), offset=64)]), "'t' lies at 64, expected 0"),
    "overlap": (file([], [tensor("t", (9,)), tensor("u", (4,), offset=32)]), "'u' lies at 32, expected 64"),
    "end": (file([], [tensor("t", (17,))]), "end at byte 132 of a file of 128"),
    "more": (file([], [tensor("t", (4,))]), "end at byte 80 of a file of 128, expected its end"),
    "tensor twice": (file([], [tensor("t", (4,)), tensor("t", (4,), offset=32)]), "tensor 't' is there twice"),
    "tensor name": (file([], [text("t" * 2000) + bytes(64)]), "2000 bytes long, expected at most 1024"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_broken_header(case: str, tmp_path: Path) -> None:
    data, message = HEADERS[case]
    (path := tmp_path / "model.gguf").write_bytes(data)
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 1
    assert str(path) in str(caught.value)


def test_arrays_and_headers_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, array = tmp_path / "model.gguf", struct.pack("<IQ", 0, 600) + bytes(600)
    path.write_bytes(file([key("a", ARRAY, array), key("b", ARRAY, array)]))
    assert len(read_header(path).metadata["b"]) == 600  # type: ignore[arg-type]
    monkeypatch.setattr(header, "MAX_ITEMS", 1000)
    with pytest.raises(CheckpointError, match="key 'b' has 600 elements, expected at most 1000 in all arrays"):
        read_header(path)
    monkeypatch.setattr(header, "MAX_HEADER", 500)
    with pytest.raises(CheckpointError, match="the limit of 500 bytes"):
        read_header(path)


# Metadata


def write(path: Path, change: Callable[[gguf.GGUFWriter], None], *, experts: int = 0, **left: Any) -> None:
    """A small model whose metadata `change` adds to; left: keys of the llama architecture to leave out or to set."""
    writer = models.Writer(path, experts, layers=1)
    for name, value in left.items():
        found = next(k for k in writer.kv_data[0] if k.endswith(name))
        if value is None:
            del writer.kv_data[0][found]
        else:
            writer.kv_data[0][found].value = value
    change(writer)
    rng = np.random.default_rng(0)
    for name, shape in models.shapes(experts, layers=1).items():
        writer.add_tensor(name, models.stored(shape, Kind.F32, rng), raw_dtype=Kind.F32)
    writer.finish()


def nothing(writer: gguf.GGUFWriter) -> None:
    pass


METADATA: dict[str, tuple[Callable[[gguf.GGUFWriter], Any], dict[str, Any], str]] = {
    "missing": (nothing, {"head_count": None, "context_length": None}, "key 'llama.context_length' is missing"),
    "text": (lambda w: w.add_string("llama.rope.freq_base", "1e4"), {}, "freq_base='1e4' is not a number"),
    "boolean": (lambda w: w.add_bool("llama.expert_count", True), {}, "expert_count=True is not an integer of 0 or"),
    "negative": (lambda w: w.add_int32("llama.attention.sliding_window", -1), {}, "sliding_window=-1 is not an int"),
    "array": (lambda w: w.add_array("llama.attention.key_length", [64, 32]), {}, r"key_length=\[64, 32\] is not"),
    "not served": (lambda w: w.add_float32("llama.logit_scale", 0.5), {}, r"llama\.logit_scale=0\.5 is not served"),
    "shared experts": (lambda w: w.add_expert_shared_count(1), {}, "expert_shared_count=1 is not served"),
    "adapter": (lambda w: w.add_type("adapter"), {}, "general.type is 'adapter', expected 'model'"),
    "old blocks": (lambda w: w.add_quantization_version(1), {}, "quantization_version is 1, expected 2"),
    "partial rotary": (lambda w: w.add_rope_dimension_count(32), {}, "rope.dimension_count=32 differs"),
    "value length": (lambda w: w.add_value_length(32), {}, "value_length=32 differs from the size of a head, 64"),
    "longrope": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), {}, "'longrope' is not served"),
    "heads": (nothing, {"head_count": 3}, r"attn_q.weight has shape \(256, 256\), expected \(255, 256\)"),
    "heads 0": (nothing, {"head_count": 0}, r"attn_q.weight has shape \(256, 256\), expected \(0, 256\)"),
    "blocks": (nothing, {"block_count": 2**31}, f"block_count={2**31}, found tensors of 1 blocks"),
    "context": (nothing, {"context_length": 2**31}, "context_length=2147483648, expected at most"),
    "stop": (lambda w: w.add_eos_token_id(2**31), {}, "special token 2147483648 is not in"),
    "infinity": (lambda w: w.add_rope_freq_base(float("inf")), {}, "rope_theta=inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_does_not_fit(case: str, tmp_path: Path) -> None:
    change, left, message = METADATA[case]
    write(path := tmp_path / "model.gguf", change, **left)
    with pytest.raises(CheckpointError, match=message):
        read_config(path)


def test_metadata_that_changes_nothing(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor_data_layout("Meta AI original pth")
        writer.add_expert_shared_count(0)
        writer.add_causal_attention(True)
        writer.add_array("llama.attention.key_length", [64, 64])  # one for each layer
        writer.add_string("somebody.else", "anything")

    write(path := tmp_path / "model.gguf", change)
    assert read_config(path) == models.config(num_layers=1)


def test_an_architecture_that_is_not_served(tmp_path: Path) -> None:
    writer = models.Writer(path := tmp_path / "model.gguf", arch="qwen2")
    writer.finish()
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'qwen2', expected one of llama, grok"):
        LLM(path)


def test_tensors_that_do_not_fit_are_all_in_one_error(tmp_path: Path) -> None:
    tensors = models.write_model(path := tmp_path / "model.gguf", Kind.Q8_0)
    tensors["blk.0.attn_q.bias"] = np.zeros(models.D, np.float32), Kind.F32
    tensors["blk.1.ffn_up.weight"] = np.zeros((7, models.D), np.float32), Kind.F32
    del tensors["output_norm.weight"]
    write_stored(path, tensors)
    with pytest.raises(CheckpointError) as caught:
        LLM(path)
    assert caught.value.problems == (
        "missing tensors ['final_norm']",
        "tensors without a place ['blk.0.attn_q.bias']",
        "layers.1.mlp.up has shape (7, 256), expected (1, 512, 256)",
    )


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_K], ids=lambda kind: kind.name)
def test_numbers_that_are_not_finite(kind: Kind, tmp_path: Path) -> None:
    tensors = models.write_model(path := tmp_path / "model.gguf", kind, layers=1)
    data = tensors["blk.0.ffn_down.weight"][0]
    if kind == Kind.F32:
        data[3, 5] = np.inf
    else:
        data[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    write_stored(path, tensors, layers=1)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down holds NaN or infinity"):
        LLM(path)


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "model.gguf").write_bytes(file([], counts=(0, 2**63)))
    for command in (["generate", "--model", str(path), "--prompt", "x"], ["plan", str(path)]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"grok-engine: error: {path}: expected at most")
