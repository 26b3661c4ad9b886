from __future__ import annotations

import filecmp
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_engine.checkpoint.base import CheckpointError, total_bytes
from grok_engine.checkpoint.quantize import quantize_matrix
from grok_engine.checkpoint.xai.layout import layout
from grok_engine.checkpoint.xai.pickle_writer import write_pickle
from grok_engine.checkpoint.xai.reader import XaiCheckpoint
from grok_engine.checkpoint.xai.writer import reference_config, write_xai
from grok_engine.config import ModelConfig
from grok_engine.loading.resolve import read_config
from grok_engine.models.families import PRESETS, preset

BF16 = np.dtype(ml_dtypes.bfloat16)
GROK_1 = preset("grok-1")
TINY = replace(
    GROK_1, name="tiny", vocab_size=40, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24,
    max_position=64, attn_scale=0.25,
)  # fmt: skip


def tensors(config: ModelConfig, dtype: Any = None, seed: int = 0) -> dict[str, tuple[Any, Any]]:
    """Random tensors of the whole layout: int8 with scales, or all in `dtype`."""
    rng = np.random.default_rng(seed)
    out: dict[str, tuple[Any, Any]] = {}
    for spec in layout(config):
        w = rng.standard_normal(spec.shape).astype(np.float32)
        if dtype is None and spec.quantizable:
            out[spec.name] = quantize_matrix(w, 8 if spec.name.endswith(("attn.o", "moe.down")) else 1)
        else:
            out[spec.name] = (w.astype(dtype or np.float32), None)
    return out


def problems(folder: Path, config: ModelConfig) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        XaiCheckpoint(folder, config)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
        assert "expected" in problem
        assert "found" in problem
    return caught.value.problems


# ---- the layout


def test_the_layout_is_that_of_the_manifests(golden: Path) -> None:
    manifest = json.loads((golden / "manifest.json").read_text())
    specs = layout(read_config(golden))
    assert len(specs) == len(manifest)
    for spec, entry in zip(specs, manifest, strict=True):
        assert (spec.index, spec.file, spec.reference) == (entry["index"], entry["file"], entry["path"])
        assert list(spec.shape) == entry["shape"]
        assert spec.quantizable == entry["quantized"]
        if spec.quantizable:
            assert list(spec.scales_shape(entry["scales_shape"][-2])) == entry["scales_shape"]


def test_names_follow_slots_and_layers_are_sorted_as_text() -> None:
    specs = layout(replace(TINY, num_layers=12))
    assert [s.name for s in specs[:2]] == ["embed", "final_norm"]
    assert [s.name.removeprefix("layers.0.") for s in specs[2:14]] == [
        "moe.gate", "moe.down", "moe.up", "attn.k", "attn.o", "attn.q", "attn.v",
        "norm.pre_attn", "norm.post_attn", "norm.pre_moe", "norm.post_moe", "moe.router",
    ]  # fmt: skip
    assert [int(s.name.split(".")[1]) for s in specs[2::12]] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert len(layout(GROK_1)) == 770


@pytest.mark.parametrize("name", ["grok-2", "mixtral-8x7b", "mistral-7b", "grok-0"])
def test_other_families_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="expect"):
        layout(PRESETS[name])


# ---- opening


def test_goldens_open(golden: Path) -> None:
    config = read_config(golden)
    manifest = json.loads((golden / "manifest.json").read_text())
    for path in (golden, golden / "ckpt-0", str(golden)):
        checkpoint = XaiCheckpoint(path, config)
        assert checkpoint.config == config
        assert total_bytes(checkpoint) == sum(e["bytes"] for e in manifest)
        for (name, file), entry in zip(checkpoint.files.items(), manifest, strict=True):
            weight, scales = file.header.weight, file.header.scales
            found = (file.spec.index, file.spec.file, file.header.file_size)
            assert found == (entry["index"], entry["file"], entry["bytes"])
            assert (list(weight.shape), weight.dtype.name) == (entry["shape"], entry["dtype"])
            assert (scales and scales.dtype.name) == entry["scales_dtype"]
            assert (scales and list(scales.shape)) == entry["scales_shape"]
            tensor = checkpoint.arrays(name)
            assert tensor.weight.shape == weight.shape
            assert (tensor.scales is None) == (scales is None)


def test_every_problem_is_in_one_error(small: Path) -> None:
    config = read_config(small)
    folder = small / "ckpt-0"
    file = [folder / spec.file for spec in layout(config)]
    file[1].unlink()  # missing
    (folder / "tensor00014_000").write_bytes(b"x")  # one too many
    data = file[2].read_bytes()
    file[2].write_bytes(data[: len(data) // 2])  # truncated
    file[3].write_bytes(b"")  # empty
    k, o = file[5].read_bytes(), file[6].read_bytes()
    file[5].write_bytes(o)  # swapped
    file[6].write_bytes(k)
    write_pickle(file[7], np.zeros((64, 6144), np.int8), np.zeros((5, 6144), BF16))  # 5 does not divide 64
    write_pickle(file[8], np.zeros((64, 1024), np.int8), None)  # without scales
    write_pickle(file[9], np.zeros(64, np.float64), None)
    write_pickle(file[10], np.zeros(64, np.int8), np.zeros(64, BF16))  # quantised, but a norm
    write_pickle(file[11], np.zeros(65, np.float32), None)
    found = problems(small, config)
    by_file: dict[str, list[str]] = {}
    for problem in found:
        by_file.setdefault(problem[: len("tensor00000_000")], []).append(problem)
    wanted = {
        1: "expected a file of shape (64,), found none",
        2: "truncated",
        3: "found an empty file",
        5: "expected shape (64, 1024), found (6144, 64)",
        6: "expected shape (6144, 64), found (64, 1024)",
        7: "found (5, 6144)",
        8: "found int8 without scales",
        9: "found float64",
        10: "found int8 with scales (64,)",
        11: "expected shape (64,), found (65,)",
        14: "expected 14 files up to tensor00013_000",
    }
    assert set(by_file) == {f"tensor{i:05d}_000" for i in wanted}
    for i, text in wanted.items():
        assert any(text in problem for problem in by_file[f"tensor{i:05d}_000"]), (i, by_file)


def test_another_models_configuration_does_not_fit(small: Path) -> None:
    config = read_config(small)
    assert any("(64, 6144)" in p for p in problems(small, replace(config, head_dim=64)))
    assert len(problems(small, replace(config, num_layers=2))) == 12
    assert problems(small, replace(config, vocab_size=4096)) == (
        "tensor00000_000 (embed): expected shape (4096, 64), found (2048, 64)",
    )


@pytest.mark.parametrize(
    ("scales", "fits"),
    [((1, 1024), True), ((2, 1024), True), ((64, 1024), True), ((3, 1024), False), ((0, 1024), False), ((1024,), False),
     ((1, 1, 1024), False), ((1, 512), False), ((128, 1024), False)],
)  # fmt: skip
def test_groups_divide_the_input_rows(scales: tuple[int, ...], fits: bool) -> None:
    spec = next(s for s in layout(replace(GROK_1, d_model=64)) if s.name == "layers.0.attn.k")
    assert spec.shape == (64, 1024)
    assert (not list(spec.problems(np.zeros(spec.shape, np.int8), np.zeros(scales, BF16)))) == fits


def test_a_hostile_file_is_named(small: Path) -> None:
    (small / "ckpt-0" / "tensor00004_000").write_bytes(b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00x\x85R.")
    (problem,) = problems(small, read_config(small))
    assert "tensor00004_000 (layers.0.moe.up)" in problem
    assert "posix.system" in problem


def test_folders_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match="ckpt-0"):
            XaiCheckpoint(path, TINY)


def test_reading_what_is_not_there(small: Path) -> None:
    checkpoint = XaiCheckpoint(small, read_config(small))
    with pytest.raises(CheckpointError, match=r"'layers\.0\.attn\.qq'"):
        checkpoint.read("layers.0.attn.qq")
    write_pickle(small / "ckpt-0" / "tensor00000_000", np.zeros((3, 3), np.float32), None)
    with pytest.raises(CheckpointError, match="as when opened"):
        checkpoint.read("embed")


# ---- writing


def test_a_golden_is_written_back_bit_for_bit(golden: Path, tmp_path: Path) -> None:
    config = read_config(golden)
    checkpoint = XaiCheckpoint(golden, config)

    def stream() -> Iterator[tuple[str, tuple[Any, Any]]]:
        for name in reversed(checkpoint.files):
            tensor = checkpoint.arrays(name)
            yield name, (tensor.weight, tensor.scales)

    write_xai(tmp_path / golden.name, config, stream())
    names = sorted(p.name for p in (golden / "ckpt-0").iterdir())
    assert sorted(p.name for p in (tmp_path / golden.name / "ckpt-0").iterdir()) == names
    _, differing, failed = filecmp.cmpfiles(golden / "ckpt-0", tmp_path / golden.name / "ckpt-0", names, shallow=False)
    assert not differing
    assert not failed
    assert json.loads((tmp_path / golden.name / "config.json").read_text()) == json.loads(
        (golden / "config.json").read_text()
    )


@pytest.mark.filterwarnings("ignore:numpy.core.*:DeprecationWarning")
def test_pickle_loads_what_was_written(tmp_path: Path, quantized: Any) -> None:
    source = tensors(TINY)
    write_xai(tmp_path / "tiny", TINY, source)
    for spec in layout(TINY):
        value = pickle.loads((tmp_path / "tiny" / "ckpt-0" / spec.file).read_bytes())
        weight, scales = source[spec.name]
        assert isinstance(value, quantized if spec.quantizable else np.ndarray)
        found = (value.weight, value.scales) if spec.quantizable else (value, None)
        np.testing.assert_array_equal(found[0], weight)
        if spec.quantizable:
            assert vars(value).keys() == {"weight", "scales"}
            np.testing.assert_array_equal(found[1], scales)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_unquantised_models_round_trip(tmp_path: Path, dtype: Any) -> None:
    source = tensors(TINY, dtype)
    write_xai(tmp_path / "tiny", TINY, source)
    config = read_config(tmp_path / "tiny")
    assert config == TINY
    checkpoint = XaiCheckpoint(tmp_path / "tiny", config)
    for name in checkpoint.files:
        read = checkpoint.arrays(name)
        assert (read.weight.dtype, read.scales) == (np.dtype(dtype), None)
        np.testing.assert_array_equal(read.weight, source[name][0])


def test_an_interrupted_write_leaves_no_half_file(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, tuple[Any, Any]]]:
        yield from list(tensors(TINY).items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_xai(tmp_path / "tiny", TINY, stream())
    assert sorted(p.name for p in (tmp_path / "tiny" / "ckpt-0").iterdir()) == [f"tensor0000{i}_000" for i in range(3)]
    found = problems(tmp_path / "tiny", read_config(tmp_path / "tiny"))
    assert len(found) == len(layout(TINY)) - 3


def test_two_models_do_not_mix(tmp_path: Path) -> None:
    write_xai(tmp_path / "tiny", TINY, tensors(TINY))
    small = replace(TINY, num_layers=1)
    with pytest.raises(CheckpointError, match="expected no tensors yet, found 26"):
        write_xai(tmp_path / "tiny", small, tensors(small))
    XaiCheckpoint(tmp_path / "tiny", TINY)
    write_xai(tmp_path / "tiny", small, tensors(small), overwrite=True)
    assert len(XaiCheckpoint(tmp_path / "tiny", read_config(tmp_path / "tiny")).tensors) == 14


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    good = tensors(TINY)
    gate, scales = good["layers.0.moe.gate"]
    cases: dict[str, tuple[Any, str]] = {
        "missing": ({k: v for k, v in good.items() if k != "layers.1.attn.o"}, r"tensor00018_000 \(layers.1.attn.o\)"),
        "unknown": (good | {"layers.2.attn.o": good["layers.1.attn.o"]}, "'layers.2.attn.o'.*unknown"),
        "repeated": ([*good.items(), ("embed", good["embed"])], "'embed'.*second"),
        "transposed": (good | {"layers.0.moe.gate": (gate.transpose(0, 2, 1), scales)}, r"found \(8, 24, 16\)"),
        "no scales": (good | {"layers.0.moe.gate": (gate, None)}, "without scales"),
        "big-endian": (good | {"embed": (good["embed"][0].astype(">f4"), None)}, "little-endian"),
    }
    for name, (given_tensors, text) in cases.items():
        with pytest.raises(CheckpointError, match=text):
            write_xai(tmp_path / name, TINY, given_tensors)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 9000))
def test_every_width_has_a_widening_factor(eighths: int, d_model: int) -> None:
    config = replace(TINY, d_model=d_model, d_ff=8 * eighths)
    reference_config(config)  # reads itself back, and compares


def test_the_releases_own_widening_factor() -> None:
    factor = reference_config(GROK_1)["model"]["widening_factor"]
    assert (factor, type(factor)) == (8, int)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"d_ff": 20}, "d_ff=20"),
        ({"rope_theta": 2e4}, "rope_theta"),
        ({"activation": "silu"}, "activation"),
        ({"renormalize": True}, "renormalize"),
        ({"router_softcap": 30.0}, "router_softcap"),
        ({"sliding_window": 32}, "sliding_window"),
        ({"eos_token_ids": (2, 3)}, "eos_token_ids"),
        ({"bos_token_id": None}, "bos_token_id"),
        ({"tie_embeddings": False}, "tie_embeddings"),
        ({"num_experts": 1, "num_experts_per_tok": 1}, "num_experts"),
    ],
)
def test_what_the_keys_cannot_say_is_refused(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        write_xai(tmp_path / "m", replace(TINY, **change), {})
    assert not (tmp_path / "m").exists()


# ---- quantising

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_quantising_is_the_formula(data: st.DataObject) -> None:
    groups, rows, columns = (data.draw(st.integers(1, 4)) for _ in range(3))
    lead = data.draw(st.sampled_from([(), (2,), (1, 2)]))
    shape = (*lead, groups * rows, columns)
    count = int(np.prod(shape))
    w = np.array(data.draw(st.lists(floats, min_size=count, max_size=count)), np.float32).reshape(shape)
    q, scales = quantize_matrix(w, groups)
    assert (q.shape, q.dtype, scales.shape, scales.dtype) == (shape, np.int8, (*lead, groups, columns), BF16)
    s = scales.astype(np.float64)
    assert np.isfinite(s).all()
    assert (s >= np.finfo(np.float32).tiny).all()
    blocks, values = w.reshape(*lead, groups, rows, columns).astype(np.float64), q.reshape(*lead, groups, rows, columns)
    amax = np.abs(blocks).max(axis=-2)
    assert (np.abs(values.astype(int)) <= 127).all()
    usual = amax >= 127 * float(np.finfo(np.float32).tiny)
    np.testing.assert_allclose(s[usual], amax[usual] / 127, rtol=2**-8)
    assert (s[amax == 0] == 1).all()
    # Half a step, and for the largest a little more, where its scale was rounded down.
    error = np.abs(values * s[..., None, :] - blocks)
    assert (error <= s[..., None, :] * (0.5 + 1e-4) + np.abs(blocks) * 2**-8 * (np.abs(values) == 127)).all()


def test_quantising_again_changes_nothing(golden: Path) -> None:
    """The release's own values, dequantised, come back when the largest of a column is 127 steps."""
    checkpoint = XaiCheckpoint(golden, read_config(golden))
    t = checkpoint.arrays("layers.0.moe.down")
    assert t.scales is not None
    groups = t.scales.shape[-2]
    experts, rows, columns = t.weight.shape
    blocks = t.weight.reshape(experts, groups, rows // groups, columns)
    w = (blocks * t.scales.astype(np.float32)[:, :, None]).reshape(t.weight.shape)
    q, scales = quantize_matrix(w, groups)
    full = np.abs(blocks.astype(int)).max(axis=2) == 127
    assert full.mean() > 0.1
    np.testing.assert_array_equal(scales[full], t.scales[full])
    np.testing.assert_array_equal(
        q.reshape(blocks.shape).transpose(0, 1, 3, 2)[full], blocks.transpose(0, 1, 3, 2)[full]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_only_finite_weights_are_quantised(bad: float) -> None:
    w = np.ones((4, 6), np.float32)
    w[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity in 1 columns"):
        quantize_matrix(w, 2)


@pytest.mark.parametrize(
    ("w", "groups", "text"),
    [
        (np.ones((4, 6), np.float32), 3, "groups=3"),
        (np.ones((4, 6), np.float32), 0, "groups=0"),
        (np.ones((4, 6), np.int8), 1, "int8"),
        (np.ones(4, np.float32), 1, r"\(4,\)"),
    ],
)
def test_what_cannot_be_quantised(w: Any, groups: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        quantize_matrix(w, groups)
