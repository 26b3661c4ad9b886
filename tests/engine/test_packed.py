"""The engine's own format: the same model bit for bit, and one clear error for whatever is not whole."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

import grok_engine
from grok_engine import LLM, CheckpointError, ConfigError, SamplingParams
from grok_engine.checkpoint import packed as container
from grok_engine.checkpoint.packed import FILE, PackedCheckpoint, Plane, arrange
from grok_engine.cli import main
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.loading.convert import convert

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
GROUPED = GOLDENS / "g8-a-emb128-k16"
IDS = [5, 6, 7, 100, 3, 2, 9]


def logits(model: str | Path, **options: Any) -> torch.Tensor:
    llm = LLM(model, num_pages=64, **options)
    try:
        return llm.logits(IDS)
    finally:
        llm.close()


def change_header(folder: Path, change: Any) -> None:
    """The file with another header, its data as it was."""
    data = (folder / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    values = json.loads(data[8 : 8 + length])
    change(values)
    text = json.dumps(values).encode()
    text += b" " * (-(len(text) + 8) % 64)
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(GROUPED, tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.mark.parametrize("source", ["tiny", GROUPED, GOLDENS / "g1-b-q48-k128"], ids=lambda s: Path(s).name)
@pytest.mark.parametrize(
    ("weights", "dtype"),
    [(None, "bfloat16"), (None, "float32"), ("bf16", "bfloat16"), ("fp8", "bfloat16"), ("fp32", "float32")],
)
def test_the_same_logits_bit_for_bit(source: Any, weights: Any, dtype: Any, tmp_path: Path) -> None:
    expected = logits(source, weights=weights, dtype=dtype)
    out = convert(source, tmp_path / "out", weights=weights, dtype=dtype)
    for options in ({}, {"weights": weights}, {"mmap": True}):
        assert torch.equal(logits(out, dtype=dtype, **options), expected), options


def test_int8_values_and_scales_are_kept(whole: Path) -> None:
    released, converted = (LLM(path, num_pages=8).model for path in (GROUPED, whole))
    for (name, a), b in zip(released.named_modules(), converted.modules(), strict=True):
        if isinstance(a, FusedWeight) and name != "embed":
            assert a.weight.dtype == b.weight.dtype == torch.int8, name
            assert torch.equal(a.matrices(), b.matrices())
            assert torch.equal(a.weight.scales, b.weight.scales)
        elif isinstance(a, NamedTensor):
            assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("mmap", [False, True])
def test_without_the_packed_form_it_is_unpacked_or_read_in_place(whole: Path, mmap: bool, monkeypatch: Any) -> None:
    monkeypatch.setenv("GROK_KERNELS_BACKEND", "reference")
    llm = LLM(whole, num_pages=8, mmap=mmap)
    assert {m.weight.layout for m in llm.model.modules() if isinstance(m, FusedWeight)} == (
        {"rows", "panels"} if mmap else {"rows"}
    )
    assert torch.equal(llm.logits(IDS), logits(GROUPED))


def test_text_comes_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", "tiny", str(out)]) == 0
    captured = capsys.readouterr()
    size = sum(file.stat().st_size for file in out.iterdir())
    assert (captured.out, captured.err) == (f"{out}: {size:,} bytes\n", "")
    texts = []
    for arguments in (["--model", "tiny"], ["--model", str(out)], ["--model", str(out), "--mmap"]):
        assert main(["generate", *arguments, "--prompt", "My dear", "--max-tokens", "8", "--seed", "1"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert len(texts[0]) > 8
    assert main(["plan", str(out), "--gpus", "1", "--json"]) == 0


def test_other_tools_can_read_the_file(whole: Path) -> None:
    with safetensors.safe_open(whole / FILE, "pt") as file:
        assert file.metadata()["format"] == "grok-engine 3"
        model = LLM(whole, num_pages=8).model
        parameters = dict(model.named_parameters())
        assert set(file.keys()) == parameters.keys()
        for name, parameter in parameters.items():
            other = file.get_tensor(name)
            assert other.dtype == parameter.dtype
            assert torch.equal(other.view(torch.uint8).flatten(), parameter.view(torch.uint8).flatten())


def test_the_data_is_aligned(whole: Path) -> None:
    length = int.from_bytes((whole / FILE).read_bytes()[:8], "little")
    assert (8 + length) % 4096 == 0
    model = LLM(whole, num_pages=8).model
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    placed = arrange(
        Plane(*plane)
        for plane in (
            ("a", torch.int8, (3,)),
            ("b", torch.float32, (16,)),
            ("c", torch.float32, (5,)),
            ("d", torch.bfloat16, (7,)),
            ("e", torch.int8, (64,)),
        )
    )
    assert [(plane.name, plane.start) for plane in placed] == [("b", 0), ("e", 64), ("c", 128), ("d", 148), ("a", 162)]


def test_the_file_is_not_written_to(whole: Path) -> None:
    before = (whole / FILE).read_bytes()
    llm = LLM(whole, num_pages=8, mmap=True)
    for parameter in llm.model.parameters():
        parameter.zero_()
    assert (whole / FILE).read_bytes() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_mapped(whole: Path, mmap: bool) -> None:
    llm = LLM(whole, num_pages=8, mmap=mmap)
    assert (str(whole / FILE) in Path("/proc/self/maps").read_text()) == mmap
    llm.close()
    del llm
    assert str(whole / FILE) not in Path("/proc/self/maps").read_text()


def test_read_in_parts_by_several_threads(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "CHUNK", 1000)
    done: list[tuple[int, int]] = []
    checkpoint = PackedCheckpoint(whole)
    room = torch.empty(checkpoint.total_bytes, dtype=torch.uint8)
    checkpoint.read_all(room, lambda *counts: done.append(counts))
    assert bytes(room.numpy()) == (whole / FILE).read_bytes()[-checkpoint.total_bytes :]
    assert [n for n, _ in done] == sorted({n for n, _ in done})
    assert done[-1] == (checkpoint.total_bytes,) * 2


# Errors


def set_dtype(values: dict[str, Any]) -> None:
    values["final_norm.weight"]["dtype"] = "BF16"


def drop_scale(values: dict[str, Any]) -> None:
    values["layers.0.attn.qkv.other"] = values.pop("layers.0.attn.qkv.scales")


def transpose(values: dict[str, Any]) -> None:
    values["layers.1.feed_forward.w2.values"]["shape"].reverse()


def move(values: dict[str, Any]) -> None:
    values["final_norm.weight"]["data_offsets"] = [n + 4 for n in values["final_norm.weight"]["data_offsets"]]


def other_format(values: dict[str, Any]) -> None:
    values["__metadata__"]["format"] = "pt"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (set_dtype, r"final_norm\.weight has 512 bytes, expected 256 for BF16"),
        (drop_scale, r"missing layers\.0\.attn\.qkv\.scales of format int8"),
        (transpose, r"w2: Weight: values ha.* expected "),
        (move, r"expected final_norm\.weight at byte \d+ of the data, found it at"),
        (other_format, "expected format 'grok-engine 3'.*found 'pt'"),
        (lambda values: values.pop("__metadata__"), "found None"),
        (lambda values: values.pop("embed.values"), "at byte"),
        (lambda values: values.update(x=5), "expected dtype, shape and data_offsets of x, found 5"),
    ],
)
def test_a_wrong_header_is_one_error(change: Any, error: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_header(folder, change)
    with pytest.raises(CheckpointError, match=error):
        LLM(folder)
    assert main(["generate", "--model", str(folder), "--token-ids", "5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1, -4096])
def test_a_file_cut_short_is_one_error(size: int, folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: expected"):
        LLM(folder)


def test_data_that_would_lie_at_odd_addresses_is_refused(folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    (folder / FILE).write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    with pytest.raises(CheckpointError, match=f"data at a multiple of 64, found it at {8 + length + 1}"):
        PackedCheckpoint(folder)


def test_a_file_with_more_than_its_tensors_is_refused(folder: Path) -> None:
    with (folder / FILE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"expected \d+ bytes by its header, found \d+"):
        LLM(folder)


def test_a_file_that_shrinks_while_it_is_read_is_one_error(folder: Path) -> None:
    checkpoint = PackedCheckpoint(folder)
    with (folder / FILE).open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="more bytes, found its end"):
        checkpoint.read_all(torch.empty(checkpoint.total_bytes, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"weights": "bf16"}, r"qkv is int8, expected bf16: other weights or dtypes"),
        ({"dtype": "float32"}, r"embed is bf16, expected fp32: other weights or dtypes"),
    ],
)
def test_other_types_take_another_conversion(options: Any, error: str, whole: Path) -> None:
    with pytest.raises(CheckpointError, match=error):
        LLM(whole, **options)


def test_another_configuration_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_layers": values["num_layers"] + 1}))
    with pytest.raises(CheckpointError, match=r"missing tensors \['layers\.2\.attn"):
        LLM(folder)


def test_mmap_needs_a_converted_model() -> None:
    with pytest.raises(ConfigError, match="mmap=True with model 'tiny' on cpu: expected a folder"):
        LLM("tiny", mmap=True)
    with pytest.raises(ConfigError, match="mmap='yes' is not True or False"):
        LLM("tiny", mmap="yes")


def test_inspect_says_what_it_expects(whole: Path, capsys: Any) -> None:
    assert main(["inspect", str(whole)]) == 2
    assert "holds converted weights, which are not inspected: expected the checkpoint" in capsys.readouterr().err


def test_progress_rises_to_the_total(whole: Path) -> None:
    done: list[tuple[int, int]] = []
    for mmap in (False, True):
        done.clear()
        engine = grok_engine.LLMEngine(whole, mmap=mmap, progress=lambda *counts: done.append(counts))
        assert done[-1] == (PackedCheckpoint(whole).total_bytes,) * 2
        assert done == sorted(set(done))
        engine.close()


def test_generation_is_the_same(whole: Path) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    tokens = []
    for model, options in ((GROUPED, {}), (whole, {}), (whole, {"mmap": True})):
        llm = LLM(model, num_pages=64, **options)
        tokens.append(llm.generate([IDS], params)[0].outputs[0].token_ids)
    assert tokens[0] == tokens[1] == tokens[2]
