"""Damaged copies of small models of every kind, and a judge of what becomes of them.

    python -m tests.checkpoint.mutants [--seed S] [--count N] [--only NUMBER]

Each mutant is inspected, planned with and loaded. Each of the three refuses it in one line, or reads what the undamaged
model says; in either case within 5 s and 500 MB. Mutant NUMBER of seed S is the same in every run.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from benchmarks.model_1b import random_tensors
from grok_engine import LLMEngine, ModelConfig
from grok_engine.checkpoint.gguf.header import read_header
from grok_engine.checkpoint.shapes import tensor_shapes
from grok_engine.checkpoint.xai.pickles import read_header as read_pickle
from grok_engine.checkpoint.xai.writer import write_xai
from grok_engine.cli import main as command_line
from grok_engine.loading.convert import convert
from grok_engine.models.families import family_of, parse_config, preset
from tests.checkpoint import gguf_models

SECONDS, MEGABYTES = 5.0, 500
TINY = Path(__file__).parents[2] / "grok_engine" / "assets" / "tiny"
Range = tuple[int, int]

# Undamaged models

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300, "hidden_act": "silu",
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": 2, "dtype": "bfloat16", "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0},
}  # fmt: skip
GROK_2 = {
    **{key: value for key, value in LLAMA.items() if key != "rope_parameters"}, "architectures": ["Grok1ForCausalLM"],
    "num_local_experts": 2, "num_experts_per_tok": 2, "residual_moe": True, "moe_intermediate_size": 64,
    "tie_word_embeddings": False, "hidden_act": "gelu", "attn_output_multiplier": 0.2, "attn_temperature_len": 64,
}  # fmt: skip
PARAMS = {
    "dim": 64, "n_layers": 1, "head_dim": 32, "hidden_dim": 96, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5,
    "vocab_size": 300, "rope_theta": 1e4, "sliding_window": 64,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INT8 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT8}}}


def tensors(values: dict[str, Any], spelling: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random tensors by the names that files have; matrices of layers in 8 bits with scales for 8-bit dtypes."""
    family, found = family_of(values), {}
    assert family is not None
    for name, shape in tensor_shapes(parse_config(values, "")).items():
        stored = family.spellings[spelling][re.sub(r"\.\d+\.", ".{i}.", name)]
        text = stored if isinstance(stored, str) else stored.name
        for e in range(shape[0]) if len(shape) == 3 else [0]:
            file_name, x = text.format(i=0, e=e), torch.randn(shape[-2:]) / 8
            if dtype.itemsize == 1 and "proj" in file_name:
                found[file_name] = (x * 64).to(dtype)
                scales = torch.tensor(1 / 64) if dtype.is_floating_point else torch.full((len(x), 1), 1 / 64)
                found[f"{file_name}_scale"] = scales
            else:
                found[file_name] = x.to(torch.bfloat16 if dtype.itemsize == 1 else dtype)
    return found


def save(folder: Path, values: dict[str, Any], files: dict[str, dict[str, torch.Tensor]], index: bool = False) -> None:
    folder.mkdir()
    (folder / ("params.json" if "dim" in values else "config.json")).write_text(json.dumps(values))
    for file, stored in files.items():
        save_file(stored, folder / file)
    if index:
        places = {name: file for file, stored in files.items() for name in stored}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def ranks(stored: dict[str, torch.Tensor], count: int = 2) -> dict[str, dict[str, torch.Tensor]]:
    """The files of Grok-2's release: experts cut for each rank, the rest in common."""
    common = {name: x for name, x in stored.items() if ".experts." not in name}
    files = {"pytorch_model-00000-TP-common.safetensors": common}
    for rank in range(count):
        files[f"pytorch_model-00001-TP-{rank:03d}.safetensors"] = {
            name: x.chunk(count, int(".w2." in name))[rank].contiguous()
            for name, x in stored.items() if ".experts." in name
        }  # fmt: skip
    return files


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran to the cat"] * 4, trainer)
    return tokenizer


def write_models(root: Path) -> dict[str, Path]:
    """A model of each kind; the paths by kind."""
    torch.manual_seed(0)
    small = replace(
        preset("grok-1"), name="small", vocab_size=1536, d_model=64, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=32, d_ff=64, num_experts=2, num_experts_per_tok=2, max_position=64,
    )  # fmt: skip
    write_xai(root / "release", small, random_tensors(small))
    shutil.copy(TINY / "tokenizer.model", root / "release")
    convert(root / "release", root / "packed", dtype="float32")
    save(root / "llama", LLAMA, {"model.safetensors": tensors(LLAMA)})
    (root / "llama" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.7}))
    (tokenizer := byte_level_tokenizer()).save(str(root / "llama" / "tokenizer.json"))
    (root / "llama" / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"})
    )
    mixtral = tensors(MIXTRAL, 0, torch.float16)
    halves = [dict(list(mixtral.items())[i::2]) for i in range(2)]
    files = {f"model-{i + 1:05d}-of-00002.safetensors": half for i, half in enumerate(halves)}
    save(root / "mixtral", MIXTRAL, files, index=True)
    save(root / "grok-2", GROK_2, ranks(tensors(GROK_2)))
    save(root / "mistral", PARAMS, {"consolidated.safetensors": tensors(PARAMS, -1)})
    for name, config, dtype in (("fp8", FP8, torch.float8_e4m3fn), ("int8", INT8, torch.int8)):
        values = {**LLAMA, "quantization_config": config}
        save(root / name, values, {"model.safetensors": tensors(values, 0, dtype)})
    (root / "gguf").mkdir()
    (root / "gguf-split").mkdir()
    write_gguf(root / "gguf" / "model.gguf", tokenizer)
    options: dict[str, Any] = {"experts": 2, "layers": 1}
    stored = gguf_models.write_model(root / "whole.gguf", {"ffn_down_exps": Kind.Q6_K, "": Kind.Q8_0}, **options)
    gguf_models.split(root / "gguf-split", stored, **options)
    (root / "whole.gguf").unlink()
    return {path.name: path for path in sorted(root.iterdir())}


def write_gguf(path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Dense, in Q4_1, with rotary scaling and the tokenizer as metadata."""

    def metadata(writer: gguf.GGUFWriter) -> None:
        vocab, merges = tokenizer.get_vocab(), json.loads(tokenizer.to_str())["model"]["merges"]
        tokens = sorted(vocab, key=lambda token: vocab[token])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_rope_freq_base(5e5)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    gguf_models.write_model(path, {"ffn_down": Kind.F16, "": Kind.Q4_1}, layers=1, change=metadata)


# What a file consists of


def data_start(path: Path) -> int:
    """Where numbers begin; structure before."""
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(path.read_bytes()[:8], "little")
    if path.suffix == ".gguf":
        return min((place.start for place in read_header(path).tensors.values()), default=path.stat().st_size)
    return path.stat().st_size


def structure(path: Path) -> list[Range]:
    """The ranges of a file that say what it holds, without the numbers; all of it where it is damaged already."""
    try:
        header = read_pickle(path) if re.fullmatch(r"tensor\d{5}_000", path.name) else None
        end = data_start(path)
    except ValueError:
        return [(0, path.stat().st_size)]
    if header is None:
        return [(0, min(end, path.stat().st_size))]
    at, found = 0, list[Range]()
    for place in sorted(filter(None, (header.weight, header.scales)), key=lambda place: place.offset):
        found.append((at, place.offset))
        at = place.offset + place.nbytes
    return [*found, (at, header.file_size)]


# Damage: each changes files in a folder, in place

INTEGERS = [0, 1, 2, 3, 7, 31, 32, 64, 127, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**6, 2**62, -(2**62), 2**70, 10**400, 0.5, -0.5, 1e-300, 1e300, float("nan"),
    float("inf"), "", "x", "16", "\ud800", "x" * 100_000, [], [1], [[1]], ["x"], [None] * 1000, {}, {"x": 1},
    {"rope_type": "yarn", "factor": 1e300}, {"rope_type": ["yarn"]}, {"weights": {"strategy": "block"}},
]  # fmt: skip


def bytes_of(rng: random.Random, path: Path) -> None:
    """A few bytes, an integer, a run removed, doubled or zeroed, within the structure."""
    data, (start, end) = bytearray(path.read_bytes()), rng.choice(structure(path))
    if end == start:
        return
    at, length = rng.randrange(start, end), rng.randrange(1, 40)
    match rng.randrange(6):
        case 0:
            for _ in range(rng.choice((1, 1, 2, 8))):
                data[rng.randrange(start, end)] = rng.choice([rng.randrange(256), *b'0123456789{}[]",:\\'])
        case 1:
            size = rng.choice((1, 2, 4, 8))
            data[at : at + size] = (rng.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, "little")
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 1, 1000))
        case 4:
            data[at : at + length] = bytes(len(data[at : at + length]))
        case 5:
            data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)])
    path.write_bytes(data)


def length_of(rng: random.Random, path: Path) -> None:
    """Cut, extended, sparse beyond any memory, or empty."""
    size = path.stat().st_size
    match rng.randrange(4):
        case 0:
            os.truncate(path, rng.randrange(size))
        case 1:
            os.truncate(path, size + rng.choice((1, 8, 32, 4096)))
        case 2:
            os.truncate(path, rng.choice((10 << 30, 1 << 40)))
        case 3:
            os.truncate(path, 0)


def entry_of(rng: random.Random, path: Path) -> None:
    """The file is gone, or something else has its name."""
    path.unlink()
    match rng.randrange(8):
        case 0 | 1:
            return
        case 2:
            path.mkdir()
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to(path.parent / "nowhere")
        case 5:
            path.symlink_to(path.name)
        case 6:
            path.symlink_to(path.parent)
        case 7:
            path.symlink_to("/dev/zero")


def swap(rng: random.Random, path: Path) -> None:
    """Two files of one kind change places, or one is there twice.

    Nothing says which of a release's pickles is which, and which of Grok-2's files is for which rank.
    """
    if re.fullmatch(r"tensor\d{5}_000", path.name):
        return
    same = [p for p in path.parent.iterdir() if p.suffix == path.suffix and p.is_file() and p.stat().st_size < 1 << 24]
    other = rng.choice(same)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    if "-TP-0" not in path.name and rng.random() < 0.7:
        other.write_bytes(first)


def json_of(rng: random.Random, path: Path) -> None:
    """A value changed, a key renamed, dropped or repeated, deep nesting: in a JSON file, or the header of tensors."""
    data, header = path.read_bytes(), path.suffix == ".safetensors"
    start = data_start(path) if header else len(data)
    try:
        values = json.loads(data[8:start] if header else data)
    except (ValueError, RecursionError):  # the second damage of a file
        return
    if not values:
        return
    node: Any = values
    parent, key = values, rng.choice(list(values))
    while isinstance(node, dict) and node and (node is values or rng.random() < 0.95):
        parent, key = node, rng.choice(list(node))
        node = node[key]
    pairs = list(parent.items())
    at = next(i for i, pair in enumerate(pairs) if pair[0] == key)
    match rng.randrange(7):
        case 0 | 1 | 2:
            pairs[at] = key, rng.choice([*VALUES, *parent.values()])
        case 3:
            pairs[at] = rng.choice([key[:-1], f"{key}x", key.upper(), rng.choice(list(parent)), ""]), node
        case 4:
            del pairs[at]
        case 5:
            pairs.append(rng.choice(pairs))
        case 6:
            pairs[at] = key, "@deep"
    parent.clear()
    parent["@pairs"] = None
    text = json.dumps(values)
    inner = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs)
    text = re.sub(r'"@pairs": null', lambda _: inner, text, count=1)
    depth = rng.choice((500, 100_000))
    text = text.replace('"@deep"', "[" * depth + "]" * depth)
    body = text.encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + data[start:] if header else body)


def mutate(rng: random.Random, folder: Path) -> str:
    """Damage one file, of which small ones are likelier than their bytes; says what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and 0 < path.stat().st_size < 1 << 24)
    if not files:
        return "nothing"
    if rng.random() < 0.4:
        files = [path for path in files if path.suffix == ".json"] or files
    path = rng.choice(files)
    damage: list[Callable[[random.Random, Path], None]] = [bytes_of] * 5 + [length_of, entry_of, swap]
    if path.suffix in (".json", ".safetensors"):
        damage += [json_of] * 6
    chosen = rng.choice(damage)
    chosen(rng, path)
    return f"{chosen.__name__} {path.relative_to(folder)}"


# The judge


@dataclass
class Read:
    """What was loaded: the architecture, the weights as bytes, and the tokenizer."""

    config: ModelConfig
    weights: dict[str, torch.Tensor]
    tokens: tuple[Any, ...]


def load(path: Path) -> Read:
    engine = LLMEngine(path, dtype="float32", num_pages=2, max_model_len=4, max_num_seqs=1)
    weights = {name: x.detach().view(-1).view(torch.uint8).clone() for name, x in engine.model.named_parameters()}
    tokenizer = engine.tokenizer
    tokens = (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.encode("the cat sat")) if tokenizer else ()
    engine.close()
    return Read(engine.config.model, weights, tokens)


def keys(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield key
            yield from keys(value)


def said(path: Path) -> dict[str, Any]:
    """What the files of a model say besides its weights: JSON and GGUF metadata, by file; of others that they exist."""
    found: dict[str, Any] = {file.name: None for file in path.rglob("*") if file.exists()}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix == ".json" and "index" not in file.name:
            with contextlib.suppress(ValueError, RecursionError):
                found[file.name] = json.loads(file.read_bytes())
        elif file.is_file() and file.suffix == ".gguf":
            found[file.name] = dict(read_header(file).metadata)
    return found


def wrong(path: Path, found: Read, original: Path, expected: Read) -> str:
    """What was read that the files do not say; "" for nothing.

    A value that was changed is another model's, and right. A key with a typo must not become a default.
    """
    if found.weights.keys() != expected.weights.keys():
        return f"weights {found.weights.keys() ^ expected.weights.keys()}"
    for name, x in expected.weights.items():
        if not torch.equal(found.weights[name], x):
            return f"the weight {name} differs"
    if (found.config, found.tokens) == (expected.config, expected.tokens):
        return ""
    before, after = said(original), said(path)
    for file in before.keys() & after.keys() - {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}:
        lost, new = ([*(set(keys(a[file])) - set(keys(b[file])))] for a, b in ((before, after), (after, before)))
        if typos := [key for key in new if difflib.get_close_matches(key, lost, 1, 0.9)]:
            return f"the keys {typos[:3]} are new, and the model is not what it was"
    return "" if after != before else "the model is not what it was, though the files say the same"


def refused(arguments: list[str]) -> bool:
    """Whether the command line refuses; an AssertionError unless that is one line, or what it says is well-formed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command_line(arguments)
    text = err.getvalue()
    assert status in (0, 1, 2), status
    assert "--debug shows where" not in text, text
    if status == 2:
        assert text.startswith("grok-engine: error: "), text
        assert text.count("\n") == 1, text
        assert len(text) < 20_000, f"{len(text)} characters"
    else:
        json.loads(out.getvalue())
    return status == 2


class Nursery:
    """Makes the mutants of a seed, in a folder of its own, and judges them."""

    def __init__(self, root: Path, seed: int) -> None:
        (models := root / "models").mkdir()
        self.models, self.seed, self.scratch = write_models(models), seed, root / "mutant"
        self.done = ""
        self.expected = {kind: load(path) for kind, path in self.models.items()}
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def judge(self, number: int) -> tuple[str, bool]:
        """The kind of a mutant, and whether it was refused; `done` is its damage. AssertionError if it got its way."""
        rng = random.Random(f"{self.seed} {number}")
        kind = rng.choice(list(self.models))
        path = self.scratch / kind  # the name of a folder is that of the model
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.models[kind], path)
        self.done = f"{kind}: " + "; ".join(mutate(rng, path) for _ in range(rng.choice((1, 1, 1, 2))))
        faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
        began = time.process_time()
        try:
            shown = refused(["inspect", str(path), "--json", *["--verify"] * (rng.random() < 0.3)])
            if rng.random() < 0.2:
                refused(["plan", str(path), "--gpus", "1", "--json"])
            found = load(path)
        except ValueError:
            loaded = False
        else:
            loaded = True
            assert not shown or kind == "packed", "it loads, and inspect refuses it"
            problem = wrong(path, found, self.models[kind], self.expected[kind])
            assert not problem, problem
        finally:
            faulthandler.cancel_dump_traceback_later()
        took = time.process_time() - began
        assert took < SECONDS, f"{took:.1f} s"
        used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory) // 1024
        assert used < MEGABYTES, f"{used} MB"
        return kind, not loaded


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoint.mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--only", type=int, help="this mutant alone, with its traceback")
    parser.add_argument("--keep-going", action="store_true", help="say every failure, not just the first ten")
    a = parser.parse_args()
    torch.set_num_threads(1)
    failures, refusals = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        nursery = Nursery(Path(root), a.seed)
        for number in range(a.count) if a.only is None else [a.only]:
            print(f"seed {a.seed}, mutant {number}", end="\r", file=sys.stderr, flush=True)
            try:
                kind, was_refused = nursery.judge(number)
                refusals[kind] += was_refused
            except BaseException as error:
                if a.only is not None or isinstance(error, KeyboardInterrupt):
                    raise
                failures += 1
                what = f"seed {a.seed}, mutant {number} ({nursery.done})"
                print(f"{what}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                if failures == 10 and not a.keep_going:
                    break
    print(f"{a.count} mutants, {refusals.total()} refused, {failures} failures; refused by kind: {dict(refusals)}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
