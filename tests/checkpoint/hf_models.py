"""Small models of transformers, saved as the hub has them, and what transformers computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

TOKENS = [1, 17, 4, 4, 90, 33, 8, 61, 2, 77, 5, 19, 44, 3, 12, 70, 55, 9, 27, 38]
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def build(kind: str, **config: Any) -> Any:
    """A random model of transformers, of `kind` Llama, Mistral or Mixtral, its norms not all ones."""
    import transformers

    torch.manual_seed(0)
    values = {**SMALL, **config}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@torch.inference_mode()
def judge(folder: Path, tokens: list[int] = TOKENS, greedy: int = 8) -> tuple[np.ndarray, list[int]]:
    """Logits (T, V) of transformers in fp32, and its greedy continuation."""
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the others take some sizes only
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager)
    ids = list(tokens)
    logits = model(torch.tensor([ids])).logits[0].double().numpy()
    for _ in range(greedy):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return logits, ids[len(tokens) :]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all files of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def save(folder: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> Path:
    """A folder with one file."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return configure(folder, values)


def save_sharded(folder: Path, shards: list[dict[str, torch.Tensor]], values: dict[str, Any]) -> Path:
    """A folder with numbered files and an index."""
    folder.mkdir(exist_ok=True)
    places = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, folder / name)
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return configure(folder, values)


def configure(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def error(ours: Any, theirs: np.ndarray) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float(np.linalg.norm(ours.double().numpy() - theirs) / np.linalg.norm(theirs))
