"""The model that ships: what its card says of it, and that the scripts that made and measured it work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from grok_engine import LLM, ModelConfig
from grok_engine.loading.load import resolve_model

ROOT = Path(__file__).resolve().parents[2]
TINY = resolve_model("tiny")
CARD = (TINY / "README.md").read_text(encoding="utf-8")
TEXTS = Path(os.environ.get("GROK_TEXTS", ROOT.parent / "shared" / "data"))
SIZES = (
    "name", "vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "attn_scale",
    "embedding_multiplier", "output_multiplier", "max_position",
)  # fmt: skip


def test_the_architecture_is_grok_1s() -> None:
    """Everything but sizes is the preset's, and the multipliers follow the width as in the releases."""
    config = ModelConfig.from_pretrained(TINY)
    sizes = {name: getattr(config, name) for name in SIZES}
    assert replace(ModelConfig.preset("grok-1"), **sizes) == config
    assert config.embedding_multiplier == pytest.approx(config.d_model**0.5)
    assert config.output_multiplier == pytest.approx((2048 / config.d_model) ** 0.5)
    assert config.attn_scale == pytest.approx(config.head_dim**-0.5)
    assert f"{config.param_count() / 1e6:.2f} M, {config.active_param_count() / 1e6:.2f} M used per token" in CARD


def test_its_size_is_what_the_card_says() -> None:
    size = sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file() and f.suffix != ".md")
    assert f"{size:,} bytes" in CARD
    assert size <= 8_000_000


def test_held_out_text_is_predicted_as_the_card_says() -> None:
    """One block of the held-out text, for time's sake; the card gives its figure apart."""
    file = TEXTS / "sherlock.txt"
    if not file.is_file():
        pytest.skip(f"{file} is not there: GROK_TEXTS names the folder of the training text")
    program = (
        "import sys; from pathlib import Path; import sentencepiece as spm; from corpus import bits_per_byte, split\n"
        "from grok_engine import LLM; llm = LLM('tiny', dtype='float32')\n"
        f"tokenizer = spm.SentencePieceProcessor(model_file={str(TINY / 'tokenizer.model')!r})\n"
        f"print(bits_per_byte(llm.model, tokenizer, split([Path({str(file)!r})])[1][:1], 512))"
    )
    paths = os.pathsep.join(map(str, (ROOT / "examples", ROOT, ROOT / "kernels")))
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, check=True
    )
    assert float(done.stdout) == pytest.approx(1.6731, abs=2e-4)
    assert "1.6731 to 1.6736" in CARD


def test_a_model_can_be_trained_resumed_and_served(tmp_path: Path) -> None:
    """Two steps of the training script, two more after an interruption, and the result generates."""
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times; 1, 2 and 3.\n" * 3000, encoding="utf-8")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    sizes = "--vocab 300 --width 32 --layers 1 --heads 6 --kv-heads 1 --head-dim 8 --context 32 --batch 4 --warmup 1"

    def train(steps: int) -> str:
        command = [sys.executable, str(ROOT / "examples" / "train_tiny.py"), str(text), "--out", str(tmp_path / "run")]
        done = subprocess.run(
            [*command, *sizes.split(), "--steps", str(steps), "--threads", "1"],
            env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "held-out" in train(2)
    assert "resumed at step 2" in train(4)
    folder = tmp_path / "run" / "model"
    llm = LLM(folder)
    assert llm.model.layers[0].attn.qkv.weight.dtype.is_signed
    assert llm.generate("It was")[0].outputs[0].token_ids
    assert json.loads((folder / "config.json").read_text())["model"]["num_layers"] == 1
