"""From one format to another: the same logits, bit for bit where nothing is rounded, and memory for one tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_engine import LLM, ModelConfig, read_config
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.loading import convert as conversion
from grok_engine.loading.convert import convert, decoder_of
from grok_engine.loading.random import random_checkpoint
from grok_engine.loading.unfused import UnfusedCheckpoint
from grok_engine.models.decoder import Decoder
from tests.checkpoint.hf_models import config_of, save, tensors_of

DATA = Path(__file__).parents[1] / "data"
SOURCES = {
    "llama-fp32": DATA / "hf" / "llama-a",
    "mixtral-bf16": DATA / "hf" / "mixtral-a",
    "grok-2": DATA / "hf" / "grok2-a",
    "grok-int8": DATA / "goldens" / "g8-a-emb128-k16",
    "mixtral-Q4_K_M": DATA / "gguf" / "mixtral-Q4_K_M.gguf",
}
IDS = [5, 6, 7, 100, 3, 2, 9]


def logits(model: Path, dtype: Any = "float32", **options: Any) -> torch.Tensor:
    llm = LLM(model, num_pages=16, dtype=dtype, **options)
    try:
        return llm.logits(IDS)
    finally:
        llm.close()


def name(number: int, format: str) -> str:
    return f"{number}.gguf" if format == "gguf" else str(number)


@pytest.mark.parametrize(
    ("source", "formats"),
    [
        ("llama-fp32", ("hf", "gguf", "packed", "hf")),
        ("mixtral-bf16", ("gguf", "packed", "gguf", "hf", "packed", "packed")),
        ("grok-2", ("hf", "packed", "hf")),
        ("grok-int8", ("hf", "packed", "hf", "hf")),
        ("mixtral-Q4_K_M", ("hf", "packed", "hf")),
    ],
)
def test_nothing_is_lost_on_the_way(source: str, formats: tuple[Any, ...], tmp_path: Path) -> None:
    """Every pair of formats that promises it, several in a row. GGUF promises floats, and Q8_0 from Q8_0."""
    model, expected = SOURCES[source], logits(SOURCES[source])
    for number, format in enumerate(formats):
        model = convert(model, tmp_path / name(number, format), format=format, dtype="float32")
        assert torch.equal(logits(model), expected), formats[: number + 1]


@pytest.mark.parametrize("weights", ["bf16", "int8", "fp8"])
def test_rounding_on_the_way_is_rounding_while_loading(weights: Any, tmp_path: Path) -> None:
    """But for the output head, which others do not read in 8 bits: of a tied model it is the embedding."""
    source = SOURCES["llama-fp32"]
    expected = logits(source, weights=weights, dtype="bfloat16")
    for format in ("hf", "packed"):
        model = convert(source, tmp_path / format, format=format, weights=weights)
        assert torch.equal(logits(model, dtype="bfloat16"), expected), format


def test_a_packed_folder_is_rounded_as_its_source_would_be(tmp_path: Path) -> None:
    source = SOURCES["mixtral-bf16"]
    packed = convert(source, tmp_path / "first", dtype="float32")
    expected = logits(source, weights="int8")
    assert torch.equal(logits(convert(packed, tmp_path / "second", weights="int8", dtype="float32")), expected)


def test_q8_0_survives_every_format(tmp_path: Path) -> None:
    first = convert(SOURCES["mixtral-bf16"], tmp_path / "first.gguf", format="gguf", weights="int8")
    expected, model = logits(first), first
    for number, format in enumerate(("packed", "hf", "gguf", "gguf")):
        model = convert(model, tmp_path / name(number, format), format=format, dtype="float32")  # type: ignore[arg-type]
        assert torch.equal(logits(model), expected), format
    assert model.read_bytes()[-100_000:] == first.read_bytes()[-100_000:]


def test_a_packed_folder_gives_its_tensors_back(tmp_path: Path) -> None:
    """Whole, by the expert and by rows, as the checkpoint that it was made of."""
    for source in ("grok-int8", "grok-2"):
        config = read_config(SOURCES[source])
        original = open_checkpoint(SOURCES[source], config)
        packed = PackedCheckpoint(convert(SOURCES[source], tmp_path / source, dtype="float32"))
        found = UnfusedCheckpoint(packed, decoder_of(config, packed))
        assert found.tensors.keys() == original.tensors.keys()
        for key, info in original.tensors.items():
            assert (found.tensors[key].shape, found.tensors[key].block) == (info.shape, info.block), key
            choices: list[dict[str, Any]] = [{}]
            if len(info.shape) > 1:
                n = info.shape[-2]
                choices += [{"rows": slice(0, n)}, {"rows": slice(n // 4, n // 2)}]
            if len(info.shape) == 3:
                choices = [{"expert": info.shape[0] - 1, **choice} for choice in choices[:2]]
            for choice in choices:
                for a, b in zip(found.read(key, **choice), original.read(key, **choice), strict=True):
                    assert torch.equal(a.float(), b.float()), (key, choice)


SIZES = st.fixed_dictionaries(
    {
        "d_model": st.sampled_from([32, 64, 96]),
        "num_layers": st.integers(1, 2),
        "num_kv_heads": st.integers(1, 2),
        "head_dim": st.sampled_from([8, 16, 32]),
        "num_experts": st.sampled_from([0, 2, 3]),
        "tie_embeddings": st.booleans(),
        "vocab_size": st.integers(101, 140),
        "ff": st.sampled_from([40, 64, 100]),
    }
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(sizes=SIZES, weights=st.sampled_from(["int8", "fp8", "bf16", "fp32"]), way=st.permutations(["hf", "gguf"]))
def test_random_models_survive(sizes: dict[str, Any], weights: Any, way: list[Any]) -> None:
    """Of odd sizes, from random weights in each format: packed first, then others, as long as they promise it."""
    experts, ff = sizes["num_experts"], sizes.pop("ff")
    sizes |= {"d_ff": ff, "num_experts_per_tok": 2, "renormalize": True} if experts else {"dense_d_ff": ff}
    config = ModelConfig(
        **sizes, num_heads=2 * sizes["num_kv_heads"], activation="silu", post_norms=False, max_position=64
    )
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder)
        (root / "config.json").write_text(json.dumps(config.to_dict()))
        weights_of = random_checkpoint(Decoder(config, torch.float32, max_positions=1), weights)
        patch.setattr(conversion, "open_checkpoint", lambda path, config: weights_of)
        model = convert(root, root.with_name(f"{root.name}-packed"), dtype="float32")
        patch.undo()
        expected = logits(model)
        for number, format in enumerate(way if weights in ("bf16", "fp32") else ["hf", "packed"]):
            model = convert(
                model, model.with_name(f"{root.name}-{name(number, format)}"), format=format, dtype="float32"
            )
            assert torch.equal(logits(model), expected), (format, config)


def test_fp16_survives_gguf(tmp_path: Path) -> None:
    tensors = {key: tensor.half() for key, tensor in tensors_of(SOURCES["llama-fp32"]).items()}
    source = save(tmp_path / "half", tensors, config_of(SOURCES["llama-fp32"]))
    path = convert(source, tmp_path / "half.gguf", format="gguf")
    assert path.stat().st_size < 0.6 * (SOURCES["llama-fp32"] / "model.safetensors").stat().st_size
    assert torch.equal(logits(path), logits(source))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc/self/status")
def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """Of a model of 50 MB, in a process of its own. A packed folder takes one module, gate and up of all experts."""
    code = f"""
import re
from dataclasses import replace
from pathlib import Path
import numpy as np, ml_dtypes
from grok_engine.models.families import preset
from grok_engine.checkpoint.xai.layout import layout
from grok_engine.checkpoint.xai.writer import write_xai
from grok_engine.loading.convert import convert
config = replace(preset("grok-1"), name="m", vocab_size=64, d_model=256, num_layers=4, num_heads=4,
                 num_kv_heads=4, head_dim=64, d_ff=2048, attn_scale=0.125, max_position=64)
def tensors():
    for spec in layout(config):
        scales = np.ones(spec.scales_shape(1), ml_dtypes.bfloat16) if spec.quantizable else None
        yield spec.name, (np.ones(spec.shape, np.int8 if spec.quantizable else np.float32), scales)
root = Path({str(tmp_path)!r})
write_xai(root / "source", config, tensors())
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
for format, weights in (("packed", "bf16"), ("hf", None), ("hf", "bf16"), ("gguf", None), ("gguf", "bf16")):
    out, peak = root / f"{{format}}-{{weights}}.gguf" if format == "gguf" else root / f"{{format}}-{{weights}}", 0
    convert("tiny", out.with_name(f"first-{{out.name}}"), format=format, weights=weights)
    before = anonymous()
    def watch(done, total):
        global peak
        peak = max(peak, anonymous())
    convert(root / "source", out, format=format, weights=weights, progress=watch)
    print(format, peak - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    module = 2 * 8 * 2 * 2048 * 256  # bytes of gate and up of all experts in bf16
    for line in done.stdout.splitlines():
        format, over = line.split()
        assert int(over) < (module if format == "packed" else 0) + 30e6, done.stdout
    assert len(done.stdout.splitlines()) == 5
