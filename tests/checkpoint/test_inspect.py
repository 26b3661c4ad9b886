from __future__ import annotations

import io
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.checkpoint.xai.pickle_writer import write_pickle
from grok_engine.checkpoint.xai.pickles import map_pickle, read_header
from grok_engine.config import ModelConfig
from grok_engine.models.families import preset
from grok_engine.tools import verify
from grok_engine.tools.inspect import Report, inspect_checkpoint
from grok_engine.tools.inspect_view import render
from tests.checkpoint.sparse import RELEASE_BYTES, write_sparse_release

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    assert write_sparse_release(folder) == RELEASE_BYTES
    return folder


def drawn(report: Report, width: int = 100, **options: Any) -> str:
    out = io.StringIO()
    render(report, Console(file=out, width=width, color_system=None), **options)
    return out.getvalue()


def test_the_release(release: Path) -> None:
    assert sum(f.stat().st_blocks * 512 for f in (release / "ckpt-0").iterdir()) < 32 << 20
    report = inspect_checkpoint(release)
    assert report.ok
    assert not report.verified
    assert report.config == preset("grok-1")
    assert len(report.tensors) == 770
    assert report.total_bytes == 318_239_886_140
    assert sum(report.bytes_by_kind.values()) == report.total_bytes
    assert sum(report.bytes_by_dtype.values()) == report.total_bytes - report.bytes_by_kind["file headers"]
    sizes = report.to_dict()
    assert sizes["parameters"] == sum(math.prod(t["shape"]) for t in sizes["tensors"])
    assert f"{sizes['parameters'] / 1e9:.1f} {sizes['active_parameters'] / 1e9:.1f}" == "315.7 83.8"
    layouts = {t.name: t.scale_layout for t in report.tensors}
    assert layouts["layers.63.attn.o"] == "8 groups of 768 input rows"
    assert layouts["layers.5.moe.down"] == "8 groups of 4096 input rows"
    assert layouts["layers.10.attn.q"] == "1 group of 6144 input rows"
    assert layouts["embed"] is None


def test_the_release_drawn(release: Path) -> None:
    report = inspect_checkpoint(release)
    text = drawn(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in text
    assert len(lines) < 40
    (row,) = (line for line in lines if line.startswith("layers.0–63.moe.down "))
    assert " ".join(row.split()) == "layers.0–63.moe.down 64 8×32768×6144 int8 8 × 4096 bf16 8.008 103.13 GB"
    assert "layers.0–63.norm.post_attn " in text
    assert "315.7 B parameters, 83.8 B used per token · 770 files · 318,239,886,140 bytes" in text
    every = drawn(report, every_tensor=True)
    assert "…" not in every
    for tensor in report.tensors:
        assert f"{tensor.name} " in every
        assert tensor.file in every


def test_the_report_is_json(golden: Path) -> None:
    for verified in (False, True):
        report = inspect_checkpoint(golden, verify=verified)
        values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert values["ok"] is True
        assert values["verified"] is verified
        assert ModelConfig.from_dict(values["architecture"]) == report.config
        assert values["files"] == len(values["tensors"]) == len(report.tensors)
        assert (values["tensors"][0]["weight"] is not None) is verified


def test_the_folder_of_tensors_itself_finds_its_configuration(golden: Path) -> None:
    assert inspect_checkpoint(golden / "ckpt-0").total_bytes == inspect_checkpoint(golden).total_bytes


def test_a_damaged_checkpoint_is_an_error(small: Path) -> None:
    (small / "ckpt-0" / "tensor00003_000").unlink()
    with pytest.raises(CheckpointError, match=r"layers\.0\.moe\.down"):
        inspect_checkpoint(small)


@pytest.mark.parametrize("chunk", [verify.CHUNK, 1000])
def test_verification_finds_the_true_ranges(small: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "CHUNK", chunk)
    seen: list[tuple[int, int]] = []
    report = inspect_checkpoint(small, verify=True, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.problems == ()
    assert seen == sorted(seen)
    assert seen[-1] == (sum(report.bytes_by_dtype.values()),) * 2
    for tensor in report.tensors:
        mapped = map_pickle(small / "ckpt-0" / tensor.file)
        for array, stats in ((mapped.weight, tensor.weight), (mapped.scales, tensor.scales)):
            assert (array is None) == (stats is None)
            if array is not None and stats is not None:
                wide = array.astype(np.float64)
                assert (stats.minimum, stats.maximum) == (wide.min(), wide.max())
                assert stats.negative == (0 if array.dtype == np.int8 else (wide < 0).sum())
    text = drawn(report)
    assert "Every number read: sound." in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_verification_counts_every_kind_of_bad_number(small: Path) -> None:
    folder = small / "ckpt-0"
    embed = map_pickle(folder / "tensor00000_000").weight.copy()
    embed[3, 5], embed[4, :3], embed[9, 9] = np.nan, np.inf, -np.inf
    write_pickle(folder / "tensor00000_000", embed, None)
    mapped = map_pickle(folder / "tensor00007_000")
    assert mapped.scales is not None
    scales = mapped.scales.copy()
    scales[0, :2], scales[0, 2], scales[0, 3], scales[0, 4:7], scales[0, 8] = 0, -1, np.nan, 1e-39, np.inf
    write_pickle(folder / "tensor00007_000", mapped.weight, scales)
    assert inspect_checkpoint(small).ok
    report = inspect_checkpoint(small, verify=True)
    assert not report.ok
    who, scale = "tensor00007_000 (layers.0.attn.q)", "expected positive, normal, finite scales, found"
    assert report.problems == (
        "tensor00000_000 (embed): expected finite weights, found 1 NaN",
        "tensor00000_000 (embed): expected finite weights, found 4 infinite",
        f"{who}: {scale} 1 NaN",
        f"{who}: {scale} 1 infinite",
        f"{who}: {scale} 2 zero",
        f"{who}: {scale} 1 negative",
        f"{who}: {scale} 3 denormal",
    )
    text = drawn(report)
    assert "7 problem(s)" in text
    assert "sound" not in text
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_tensor_of_nothing_but_nan(tmp_path: Path) -> None:
    write_pickle(tmp_path / "t", np.full((4, 4), np.nan, np.float32), None)
    stats = verify.scan(tmp_path / "t", read_header(tmp_path / "t").weight, lambda n: None)
    assert (stats.minimum, stats.maximum, stats.nan, stats.inf) == (None, None, 16, 0)


def test_verification_holds_a_few_chunks_at_most(release: Path) -> None:
    header = read_header(release / "ckpt-0" / "tensor00005_000")
    assert header.scales is not None
    assert header.scales.nbytes < header.weight.nbytes < 8 << 20
    place = read_header(release / "ckpt-0" / "tensor00002_000").weight
    part = type(place)((1 << 28,), place.dtype, place.offset, 1 << 28, place.fortran)
    for dtype, itemsize in ((np.dtype(np.int8), 1), (BF16, 2), (np.dtype(np.float32), 4)):
        piece = type(part)((part.nbytes // itemsize,), dtype, part.offset, part.nbytes, False)
        tracemalloc.start()
        stats = verify.scan(release / "ckpt-0" / "tensor00002_000", piece, lambda n: None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (stats.minimum, stats.maximum) == (0, 0)
        assert peak < 12 * verify.CHUNK
        assert peak < part.nbytes


def test_a_file_cut_short_after_opening(small: Path) -> None:
    file = small / "ckpt-0" / "tensor00000_000"
    header = read_header(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="end of the file"):
        verify.scan(file, header.weight, lambda n: None)
