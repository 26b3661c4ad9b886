"""The one protocol: whatever the format, whole tensors and parts of them agree, and one filler takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from grok_engine.checkpoint.base import Checkpoint, CheckpointError, TensorInfo, take
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.checkpoint.random import RandomCheckpoint
from grok_engine.checkpoint.xai.reader import XaiCheckpoint
from grok_engine.loading.convert import convert
from grok_engine.loading.fill import fill
from grok_engine.loading.random import random_checkpoint
from grok_engine.loading.resolve import read_config
from grok_engine.models.decoder import Decoder
from grok_engine.models.families import preset
from tests.checkpoint.sparse import write_sparse_release

GROUPED = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"
TINY = replace(
    preset("grok-1"), name="tiny", vocab_size=40, d_model=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    num_experts=4, d_ff=24, max_position=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    packed = convert(GROUPED, tmp_path_factory.mktemp("packed") / "model")
    config = read_config(GROUPED)
    made = {weights: random_checkpoint(Decoder(config, torch.bfloat16), weights) for weights in (None, "fp8", "bf16")}
    return {
        "release": open_checkpoint(GROUPED, config),
        "packed": open_checkpoint(packed, config),
        **{f"random {weights}": checkpoint for weights, checkpoint in made.items()},
    }


KINDS = ["release", "packed", "random None", "random fp8", "random bf16"]


def test_the_format_is_recognised(opened: dict[str, Checkpoint]) -> None:
    assert isinstance(opened["release"], XaiCheckpoint)
    assert isinstance(opened["packed"], PackedCheckpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_planes_are_as_described(kind: str, opened: dict[str, Checkpoint]) -> None:
    checkpoint = opened[kind]
    for name, info in checkpoint.tensors.items():
        planes = checkpoint.read(name)
        assert info.name == name
        assert len(planes) == (1 if info.block is None else 2)
        if info.layout == "rows":
            assert tuple(planes[0].shape) == info.shape
        if info.block is not None:
            *lead, n, k = info.shape
            assert tuple(planes[1].shape) == (*lead, n // info.block[0], k // info.block[1])
    with pytest.raises(CheckpointError, match="'nothing'"):
        checkpoint.read("nothing")


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_what_the_whole_has_there(kind: str, opened: dict[str, Checkpoint]) -> None:
    checkpoint = opened[kind]
    for name, info in checkpoint.tensors.items():
        if info.layout != "rows" or len(info.shape) == 1:
            continue
        whole, rows = checkpoint.read(name), slice(3, info.shape[-2] - 2)
        for part, plane in zip(checkpoint.read(name, rows=rows), whole, strict=True):
            assert torch.equal(part, plane[..., rows, :])
        if len(info.shape) == 3:
            last = info.shape[0] - 1
            for part, plane in zip(checkpoint.read(name, expert=last, rows=rows), whole, strict=True):
                assert torch.equal(part, plane[last, rows])


def test_a_packed_expert_is_read_alone_but_its_rows_are_not(opened: dict[str, Checkpoint]) -> None:
    checkpoint = opened["packed"]
    name = next(n for n, info in checkpoint.tensors.items() if info.layout == "panels" and len(info.shape) == 3)
    last = checkpoint.tensors[name].shape[0] - 1
    assert torch.equal(checkpoint.read(name, expert=last)[0], checkpoint.read(name)[0][last])
    with pytest.raises(ValueError, match=r"rows 0\.\.64 .*found layout panels"):
        checkpoint.read(name, rows=slice(0, 64))


def test_an_expert_of_the_release_is_read_without_the_others(tmp_path: Path) -> None:
    """A matrix of 1.6 GB, of which a few rows of one expert are read: (out, in), though the file has (in, out)."""
    write_sparse_release(tmp_path)
    checkpoint = open_checkpoint(tmp_path, preset("grok-1"))
    values, scales = checkpoint.read("layers.63.moe.down", expert=7, rows=slice(6140, 6144))
    assert (tuple(values.shape), tuple(scales.shape)) == ((4, 32768), (4, 8))
    assert values.stride() == (1, 6144)
    assert not values[:, ::4096].any()
    assert checkpoint.tensors["layers.63.moe.down"].block == (1, 4096)
    assert checkpoint.tensors["embed"].shape == (131072, 6144)


@pytest.mark.parametrize(
    ("start", "stop", "fits"), [(128, 300, True), (0, 256, True), (64, 128, False), (0, 200, False)]
)
def test_rows_keep_to_the_block_of_their_scales(start: int, stop: int, fits: bool) -> None:
    """The last block of 300 rows has 44."""
    info = TensorInfo(name="x", shape=(300, 256), format="fp8_e4m3", block=(128, 128), nbytes=0)
    planes = torch.zeros(300, 256), torch.arange(6.0).view(3, 2)
    if not fits:
        with pytest.raises(ValueError, match=f"x: rows {start}..{stop} of 300, expected multiples of the block of 128"):
            take(info, planes, None, slice(start, stop))
        return
    values, scales = take(info, planes, None, slice(start, stop))
    assert len(values) == stop - start
    assert torch.equal(scales, planes[1][start // 128 : -(-stop // 128)])


# Random weights


def test_random_tensors_follow_from_name_and_seed() -> None:
    infos = [TensorInfo(name=name, shape=(70, 1000), format="bf16", nbytes=140000) for name in ("a", "b")]
    one, same, other = (RandomCheckpoint(infos, seed) for seed in (0, 0, 1))
    b = one.read("b")[0]
    assert torch.equal(same.read("b")[0], b)  # though nothing else was read before
    assert not torch.equal(one.read("a")[0], b)
    assert not torch.equal(other.read("b")[0], b)
    assert b.float().std().item() == pytest.approx(1000**-0.5, rel=0.02)


# Formats that no reader has yet


class Held:
    """A checkpoint in memory."""

    source = "memory"

    def __init__(self, infos: list[TensorInfo], planes: Mapping[str, tuple[Tensor, ...]]) -> None:
        self.tensors, self.planes = {info.name: info for info in infos}, planes

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        return take(self.tensors[name], self.planes[name], expert, rows)


@pytest.mark.parametrize("block", [(5, 7), (1, 16), (1000, 1000)], ids=["blocks", "channel", "tensor"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp8"])
def test_scales_of_any_block_are_applied(block: tuple[int, int], weights: str) -> None:
    """e4m3 with a scale a block, the last blocks of rows and columns smaller, as rows of (out, in)."""
    model, rng = Decoder(TINY, torch.float32), torch.Generator().manual_seed(0)
    infos, planes, meant = [], {}, {}
    for name, info in random_checkpoint(model, "bf16").tensors.items():
        values = torch.randn(info.shape, generator=rng)
        if info.format != "bf16":
            infos.append(info)
            planes[name], meant[name] = (values,), values
            continue
        n, k = info.shape[-2:]
        bn, bk = min(block[0], n), min(block[1], k)
        values = values.to(torch.float8_e4m3fn)
        scales = torch.rand((*info.shape[:-2], -(-n // bn), -(-k // bk)), generator=rng) + 0.5
        wide = scales.repeat_interleave(bn, -2)[..., :n, :].repeat_interleave(bk, -1)[..., :k]
        infos.append(replace(info, format="fp8_e4m3", block=(bn, bk)))
        planes[name], meant[name] = (values, scales), values.float() * wide
    fill(model, Held(infos, planes), weights=weights)  # type: ignore[arg-type]
    gate, up = meant["layers.0.moe.gate"], meant["layers.0.moe.up"]
    w13 = model.layers[0].feed_forward.w13
    expected = torch.cat([gate, up], 1)
    if weights == "fp8" and block != (1, 16):
        found = w13.matrices().float() * w13.weight.scales.mT
        assert ((found - expected).abs() <= expected.abs().amax(-1, keepdim=True) / 15).all()
    elif weights == "fp8":
        assert torch.equal(w13.matrices().float() * w13.weight.scales.mT, expected)
    else:
        assert torch.equal(w13.matrices().float(), expected.to(w13.weight.dtype).float())
    np.testing.assert_array_equal(model.embed.matrices()[0].numpy(), meant["embed"].numpy())


def test_all_that_does_not_fit_is_one_error() -> None:
    model = Decoder(TINY, torch.float32)
    tensors = dict(random_checkpoint(model).tensors)
    del tensors["final_norm"]
    tensors["odd"] = replace(tensors["embed"], name="odd")
    tensors["layers.0.attn.q"] = replace(tensors["layers.0.attn.q"], shape=(16, 32))
    tensors["layers.0.moe.down"] = replace(tensors["layers.0.moe.down"], block=None)
    with pytest.raises(CheckpointError) as caught:
        fill(model, Held(list(tensors.values()), {}))
    assert caught.value.problems == (
        "missing tensors ['final_norm']",
        "tensors without a place ['odd']",
        "layers.0.attn.q has shape (16, 32), expected (1, 32, 16)",
        "layers.0.moe.down is int8 without scales",
    )
