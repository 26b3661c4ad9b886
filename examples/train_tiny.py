"""Train a small model of Grok-1's architecture on plain text, and write it in the release's own format.

    python examples/train_tiny.py --out runs/tiny text1.txt text2.txt

Interrupted, the same command resumes from runs/tiny/state.pt. At the end runs/tiny/model holds ckpt-0/ (int8 and
scales), config.json and tokenizer.model, ready for `grok-engine generate --model runs/tiny/model`, and
runs/tiny/model-bf16 the same weights in bf16, to compare with.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import sentencepiece as spm
import torch
from corpus import bits_per_byte, encode, logits, split, train_tokenizer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from grok_engine.checkpoint.xai.writer import write_xai
from grok_engine.config import ModelConfig
from grok_engine.layers.attention import Attention
from grok_engine.layers.moe import Experts, Router
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.loading.export import export_weights
from grok_engine.models.decoder import Decoder
from grok_engine.models.families import preset
from grok_engine.models.families.grok import ffn_width
from grok_kernels import Spec


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("files", nargs="+", type=Path, help="plain text, UTF-8")
    add("--out", type=Path, required=True)
    add("--vocab", type=int, default=1536, help="pieces of the tokenizer")
    add("--width", type=int, default=192, help="D")
    add("--layers", type=int, default=5)
    add("--heads", type=int, default=12)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=32)
    add("--widening", type=float, default=2.0, help="F is two thirds of this times D")
    add("--context", type=int, default=256, help="tokens of a training window")
    add("--batch", type=int, default=16, help="windows a step")
    add("--steps", type=int, default=6000)
    add("--minutes", type=float, default=0, help="fit the schedule into this time instead of --steps")
    add("--lr", type=float, default=3e-3)
    add("--warmup", type=int, default=100)
    add("--weight-decay", type=float, default=0.1)
    add("--dropout", type=float, default=0.1, help="on what each block adds to the residual")
    add("--bpe-dropout", type=float, default=0.05)
    add("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    add("--eval-every", type=int, default=500)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=0, help="0 keeps torch's choice")
    return parser.parse_args()


def architecture(a: argparse.Namespace) -> ModelConfig:
    """Grok-1 at another width: √D into the embedding and √(2048 / D) out of it, as the releases have them."""
    return replace(
        preset("grok-1"),
        name="tiny",
        vocab_size=a.vocab,
        d_model=a.width,
        num_layers=a.layers,
        num_heads=a.heads,
        num_kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        d_ff=ffn_width(a.widening, a.width),
        embedding_multiplier=math.sqrt(a.width),
        output_multiplier=math.sqrt(2048 / a.width),
        attn_scale=a.head_dim**-0.5,
        max_position=a.context,
    )


def initialise(model: Decoder) -> None:
    """Every matrix at std 1 / √K, norms at one; all trainable fp32."""
    for module in model.modules():
        if isinstance(module, FusedWeight):
            module.allocate(Spec("fp32"), "cpu")
            nn.init.normal_(module.weight.values, std=module.k**-0.5)
        elif isinstance(module, NamedTensor):
            module.allocate("cpu")
            if len(module.shape) == 1:
                nn.init.ones_(module.weight)
            else:
                nn.init.normal_(module.weight, std=module.shape[1] ** -0.5)
    model.requires_grad_(True)


class Balance:
    """Load-balancing loss of Switch Transformers (Fedus 2021), eq. 4: E · Σ_e share of rows · mean probability."""

    def __init__(self, model: Decoder) -> None:
        self.losses: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self.hook)

    def hook(self, router: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        probs_E = torch.softmax(inputs[0] @ router.weight.t(), -1).mean(0)
        share_E = torch.bincount(output[1].flatten(), minlength=probs_E.shape[0]) / output[1].numel()
        self.losses.append(probs_E.shape[0] * (probs_E * share_E).sum())

    def take(self) -> Tensor:
        total = torch.stack(self.losses).mean()
        self.losses.clear()
        return total


def add_dropout(model: Decoder, p: float) -> None:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, p, training=torch.is_grad_enabled())

    for module in model.modules():
        if isinstance(module, (Attention, Experts)):
            module.register_forward_hook(hook)


def windows(
    texts: list[str], tokenizer: spm.SentencePieceProcessor, a: argparse.Namespace, epoch: int
) -> Iterator[Tensor]:
    """Batches (B, context + 1) of one pass over the text, freshly cut and freshly tokenised each epoch."""
    generator = torch.Generator().manual_seed(a.seed + epoch)
    ids = encode(tokenizer, texts, a.bpe_dropout)
    shift = int(torch.randint(a.context, (1,), generator=generator))
    starts = torch.arange(shift, len(ids) - a.context - 1, a.context)
    for rows in starts[torch.randperm(len(starts), generator=generator)].split(a.batch):
        if len(rows) == a.batch:
            yield torch.stack([ids[s : s + a.context + 1] for s in rows.tolist()])


def save(file: Path, model: Decoder, optimizer: torch.optim.Optimizer, step: int, epoch: int, elapsed: float) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "epoch": epoch,
        "elapsed": elapsed,
    }
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def main() -> None:
    a = arguments()
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    train_texts, held_out = split(a.files)
    tokenizer_file = a.out / "tokenizer.model"
    if not tokenizer_file.exists():
        train_tokenizer(train_texts, a.vocab, a.out)
    tokenizer = spm.SentencePieceProcessor(model_file=str(tokenizer_file))
    model = Decoder(architecture(a), torch.float32)
    initialise(model)
    balance = Balance(model)
    add_dropout(model, a.dropout)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": a.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.95), fused=True)
    state_file = a.out / "state.pt"
    step = epoch = 0
    elapsed = 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, elapsed = state["step"], state["epoch"], state["elapsed"]
        print(f"resumed at step {step}, epoch {epoch}, after {elapsed / 60:.1f} minutes of training")
    print(
        f"{model.config.param_count() / 1e6:.2f} M parameters, {model.config.active_param_count() / 1e6:.2f} M active"
    )

    def done() -> float:
        return elapsed / 60 / a.minutes if a.minutes else step / a.steps

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=1.0, completed=done())
        while done() < 1:
            for batch in windows(train_texts, tokenizer, a, epoch):
                began = time.monotonic()
                fraction = done()
                rate = (
                    a.lr
                    * min(1.0, (step + 1) / a.warmup)
                    * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0))))
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = nn.functional.cross_entropy(logits(model, batch[:, :-1].contiguous()), batch[:, 1:].flatten())
                spread = balance.take()
                (loss + a.balance * spread).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                took = time.monotonic() - began
                elapsed += took
                progress.update(
                    bar, completed=min(done(), 1.0),
                    description=f"step {step} loss {loss.item():.3f} balance {spread.item():.3f} "
                    f"{batch.numel() / took:,.0f} tokens/s",
                )  # fmt: skip
                if not progress.console.is_terminal and step % 50 == 0:
                    print(f"step {step} loss {loss.item():.4f} {batch.numel() / took:,.0f} tokens/s", flush=True)
                if step % a.eval_every == 0 or done() >= 1:
                    bpb = bits_per_byte(model, tokenizer, held_out, a.context)
                    progress.console.print(
                        f"step {step} epoch {epoch} minutes {elapsed / 60:.1f} loss {loss.item():.4f} "
                        f"balance {spread.item():.3f} "
                        f"held-out {bpb:.4f} bits/byte, {batch.numel() / took:,.0f} tokens/s"
                    )
                    save(state_file, model, optimizer, step, epoch, elapsed)
                if done() >= 1:
                    break
            epoch += 1
    for name, quantized in (("model", True), ("model-bf16", False)):
        write_xai(a.out / name, model.config, export_weights(model, quantized=quantized), overwrite=True)
        shutil.copyfile(tokenizer_file, a.out / name / "tokenizer.model")
        print(f"wrote {a.out / name}")


if __name__ == "__main__":
    main()
