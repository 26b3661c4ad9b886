"""GGUF files that we write: judged by llama.cpp's recorded answers and by the gguf package."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from grok_engine import LLM, CheckpointError, ConfigError, SamplingParams, read_config
from grok_engine.checkpoint.gguf.metadata import gguf_metadata
from grok_engine.checkpoint.gguf.reader import GGUFCheckpoint
from grok_engine.checkpoint.gguf.writer import q8_0
from grok_engine.loading.convert import convert
from grok_engine.models.families import preset
from grok_engine.tokenizer.gguf_metadata import tokenizer_metadata
from grok_engine.tokenizer.load import load_tokenizer
from tests.checkpoint import gguf_models as models
from tests.checkpoint.hf_models import config_of, configure, save, tensors_of
from tests.checkpoint.llama_cpp_golden import CASES, GOLDEN, PROMPT, TEXT, written

DATA = Path(__file__).parents[1] / "data"
HF, GROK = DATA / "hf", DATA / "goldens" / "g8-a-emb128-k16"


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_answers_as_we_do(case: str, tmp_path: Path) -> None:
    """Its products with Q8_0 round the activations too, and its gelu is a table in fp16."""
    golden = np.load(GOLDEN)
    path, digest = written(case, tmp_path)
    assert digest == str(golden[f"{case}.sha256"]), "another file than llama.cpp ran: run llama_cpp_golden.py again"
    llm = LLM(path, dtype="float32", num_pages=16)
    ours, theirs = llm.logits(PROMPT)[-1].numpy(), golden[f"{case}.logits"]
    bound = {"int8": 0.15 if "mixtral" in case else 0.01, "bf16": 0.01, "fp32": 2e-4}[case.rpartition("-")[2]]
    assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs)
    greedy = golden[f"{case}.greedy"].tolist()
    params = SamplingParams(max_tokens=len(greedy), temperature=0, ignore_eos=True)
    if "mixtral" not in case:  # whose random weights have near ties
        assert list(llm.generate([PROMPT], params)[0].outputs[0].token_ids) == greedy
    if f"{case}.text" in golden:
        assert golden[f"{case}.text"].tolist() == llm.encode(TEXT)
    llm.close()


@pytest.mark.parametrize("shape", [(3, 32), (5, 320), (64, 64)])
def test_q8_0_is_the_packages_bit_for_bit(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(shape[0]).standard_normal(shape, np.float32)
    x[0, :32], x[1, 0], x[2, :4] = 0, 1e6, (0.5, -0.5, 1.5, 127)  # a block of zeros, an infinite scale, halves
    with np.errstate(all="ignore"):
        assert bytes(q8_0(torch.from_numpy(x))) == gguf.quants.quantize(x, Kind.Q8_0).tobytes()


@pytest.mark.parametrize("experts", [0, 4])
def test_q8_0_stays_bit_for_bit(experts: int, tmp_path: Path) -> None:
    """Q4_0, BF16 and F16 stay too; other symmetric types become Q8_0, those with minima and norms F32."""
    kinds = {"attn_q": Kind.Q8_0, "ffn_up": Kind.Q8_0, "ffn_up_exps": Kind.Q8_0, "attn_k": Kind.BF16,
             "attn_v": Kind.F16, "attn_output": Kind.Q4_0, "ffn_gate": Kind.Q5_0,
             "ffn_down": Kind.Q4_1, "output": Kind.Q8_0}  # fmt: skip
    before = models.write_model(tmp_path / "model.gguf", kinds, experts)
    after = tensors(convert(tmp_path / "model.gguf", tmp_path / "out.gguf", format="gguf"))
    assert before.keys() == after.keys()
    for name, (data, kind) in before.items():
        found = after[name]
        kept = kind in (Kind.Q8_0, Kind.Q4_0, Kind.BF16, Kind.F16, Kind.F32)
        assert found.tensor_type == (kind if kept else Kind.Q8_0 if kind == Kind.Q5_0 else Kind.F32), name
        if kept:
            assert found.data.tobytes() == data.tobytes(), name
        else:  # 5-bit values with fp16 scales fit a block of Q8_0
            values = gguf.quants.dequantize(found.data, found.tensor_type)
            assert np.array_equal(values, models.dequantized(data, kind)), name


def test_int8_by_channel_keeps_its_values_where_a_block_can(tmp_path: Path) -> None:
    """The release's scales are bf16 numbers, which fp16 has too: of 32 columns each is written once for every block."""
    path = convert(GROK, tmp_path / "out.gguf", format="gguf")
    reader, released = tensors(path), read_config(GROK)
    written = GGUFCheckpoint(path, released)
    from grok_engine.checkpoint.open import open_checkpoint

    source = open_checkpoint(GROK, released)
    q, scales = source.read("layers.0.attn.q")
    found, blocks = written.read("layers.0.attn.q")
    assert torch.equal(found, q)
    assert torch.equal(blocks, scales.float().expand(-1, blocks.shape[1]))
    assert reader["blk.0.attn_q.weight"].tensor_type == Kind.Q8_0
    assert reader["blk.0.ffn_gate_inp.weight"].tensor_type == reader["blk.0.attn_norm.weight"].tensor_type == Kind.F32


def test_scales_that_fp16_has_not_are_rounded_anew(tmp_path: Path) -> None:
    folder = convert(HF / "llama-a", tmp_path / "packed", weights="int8", dtype="float32")
    path = convert(folder, tmp_path / "out.gguf", format="gguf")
    exact = tensors_of(HF / "llama-a")["model.layers.0.mlp.down_proj.weight"].float().numpy()
    found = tensors(path)["blk.0.ffn_down.weight"]
    values = gguf.quants.dequantize(found.data, found.tensor_type)
    assert np.abs(values - exact).max() <= 1.01 * np.abs(exact).max() / 127  # rounded twice, by half a step


@pytest.mark.parametrize("weights", ["bf16", "fp32", "int8"])
def test_formats_are_the_packages(weights: Any, tmp_path: Path) -> None:
    """Of q, whose rows llama.cpp wants interleaved, of an expert and of the embedding."""
    source = tensors_of(HF / "mixtral-a")
    found = tensors(convert(HF / "mixtral-a", tmp_path / "out.gguf", format="gguf", weights=weights))
    kind = {"bf16": Kind.BF16, "fp32": Kind.F32, "int8": Kind.Q8_0}[weights]
    heads = config_of(HF / "mixtral-a")["num_attention_heads"]
    q = source["model.layers.1.self_attn.q_proj.weight"].float().numpy()
    q = q.reshape(heads, 2, q.shape[0] // heads // 2, q.shape[1]).swapaxes(1, 2).reshape(q.shape)
    expected = {"blk.1.attn_q.weight": q, "token_embd.weight": source["model.embed_tokens.weight"].float().numpy()}
    for name, x in expected.items():
        assert found[name].tensor_type == kind
        assert found[name].data.tobytes() == gguf.quants.quantize(x, kind).tobytes()
    expert = source["model.layers.0.block_sparse_moe.experts.5.w2.weight"].float().numpy()
    stack = found["blk.0.ffn_down_exps.weight"].data
    assert stack[5].tobytes() == gguf.quants.quantize(expert, kind).tobytes()


def test_rotary_factors_become_a_tensor(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    shutil.copytree(HF / "llama-a", tmp_path / "model")
    configure(tmp_path / "model", {**config_of(HF / "llama-a"), "rope_parameters": rope})
    path = convert(tmp_path / "model", tmp_path / "out.gguf", format="gguf")
    found, expected = read_config(path), read_config(tmp_path / "model")
    assert np.allclose(found.rope_factors, expected.rope_factors, rtol=1e-6)
    assert replace(found, rope_factors=(), name="", norm_eps=1.0) == replace(
        expected, rope_factors=(), name="", norm_eps=1.0
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sliding_window": 16}, "sliding_window=16: attention is over all"),
        ({"attn_scale": 0.5}, r"attn_scale=0\.5: expected head_dim"),
        ({"activation": "gelu"}, "activation='gelu' would be read as 'silu'"),
        ({"final_softcap": 5.0}, r"final_softcap=5\.0 would be read as 0\.0"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier"),
        ({"renormalize": False}, "renormalize=False: the weights"),
        ({"dense_d_ff": 64}, "dense_d_ff=64 would be read as 0"),
        ({"post_norms": True, "head_dim": 64}, "num_heads \\* head_dim = 2048: expected d_model=4096"),
        ({"eos_token_ids": (1, 2, 3, 4)}, "eos_token_ids"),
    ],
)
def test_what_llama_cpp_would_not_follow_is_refused_by_name(changes: dict[str, Any], problem: str) -> None:
    config = replace(preset("mixtral-8x7b"), attn_scale=0.0)
    config = replace(config, **{"attn_scale": 0.0, **changes})
    names = {f"blk.{i}.attn_q.weight" for i in range(config.num_layers)} | {"output.weight"}
    places = {name: _place(name, config) for name in names}
    with pytest.raises(CheckpointError, match=problem):
        gguf_metadata(config, {}, places)


def _place(name: str, config: Any) -> Any:
    from grok_engine.checkpoint.gguf.blocks import TYPES
    from grok_engine.checkpoint.gguf.header import Place

    return Place(name, TYPES[0], (config.num_heads * config.head_dim, config.d_model), 0)


def test_fp8_and_wrong_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="GGUF has no 8-bit floats"):
        convert(HF / "llama-a", tmp_path / "out.gguf", format="gguf", weights="fp8")
    with pytest.raises(ConfigError, match=r"expected the name of a file that ends in \.gguf"):
        convert(HF / "llama-a", tmp_path / "out", format="gguf")
    with pytest.raises(ConfigError, match=r"expected the name of a folder for format 'hf'"):
        convert(HF / "llama-a", tmp_path / "out.gguf", format="hf")
    assert not list(tmp_path.iterdir())


# Tokenizers


def test_the_small_models_tokenizer_comes_back(tmp_path: Path) -> None:
    path = convert("tiny", tmp_path / "out.gguf", format="gguf")
    before, after = load_tokenizer(LLM_TINY), load_tokenizer(path)
    assert before is not None
    assert after is not None
    for text in (TEXT, "\n\n\tA  b\n \n", "日本語 🙂 \x00", ""):
        assert after.encode(text) == before.encode(text)
        assert after.decode(before.encode(text)) == before.decode(before.encode(text))
    assert (after.bos_token_id, after.eos_token_ids) == (before.bos_token_id, before.eos_token_ids)


LLM_TINY = Path(__file__).parents[2] / "grok_engine" / "assets" / "tiny"


def byte_level(folder: Path, pre: dict[str, Any]) -> Path:
    """A folder with a byte-level tokenizer of four tokens."""
    folder.mkdir(exist_ok=True)
    values = {
        "version": "1.0",
        "added_tokens": [{"id": 4, "content": "<|im_end|>", "special": True, "normalized": False,
                          "single_word": False, "lstrip": False, "rstrip": False}],
        "pre_tokenizer": pre,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3}, "merges": [["a", "b"]],
                  "ignore_merges": False},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "add_bos_token": False, "chat_template": "{{ x }}"})
    )
    return folder


DIGITS = {"type": "Sequence", "pretokenizers": [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]}  # fmt: skip


def test_a_byte_level_tokenizer_has_llama_cpps_name(tmp_path: Path) -> None:
    found = tokenizer_metadata(byte_level(tmp_path, DIGITS), 6)
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.ggml.tokens"] == ("a", "b", "Ġ", "ab", "<|im_end|>", "[PAD5]")
    assert found["tokenizer.ggml.token_type"] == (1, 1, 1, 1, 3, 5)
    assert found["tokenizer.ggml.merges"] == ("a b",)
    assert found["tokenizer.ggml.eos_token_id"] == 4
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ x }}"
    with pytest.raises(ValueError, match=r"llama\.cpp has no name"):
        tokenizer_metadata(byte_level(tmp_path, {"type": "Whitespace"}), 6)


def test_a_tokenizer_and_template_survive_the_way_there_and_back(tmp_path: Path) -> None:
    source = save(tmp_path / "model", tensors_of(HF / "llama-a"), config_of(HF / "llama-a"))
    byte_level(source, DIGITS)
    path = convert(source, tmp_path / "out.gguf", format="gguf")
    folder = convert(path, tmp_path / "hf", format="hf")
    assert (folder / "chat_template.jinja").read_text() == "{{ x }}"
    again = convert(folder, tmp_path / "again.gguf", format="gguf")
    keys = [
        {f.name: f.contents() for f in gguf.GGUFReader(p).fields.values() if f.name.startswith("tokenizer.ggml")}
        for p in (path, again)
    ]
    keys[1]["tokenizer.ggml.token_type"] = keys[0]["tokenizer.ggml.token_type"]  # unused ones are normal by now
    assert keys[0] == keys[1]
    assert "tokenizer.ggml.tokens" in keys[0]


def around(folder: Path, single: list[str], **changes: Any) -> Path:
    """`byte_level` with a second control token and these tokens around a prompt, "A" for its text; changes: of the
    first one."""
    values = json.loads((byte_level(folder, DIGITS) / "tokenizer.json").read_text())
    (first,) = values["added_tokens"]
    values["added_tokens"] = [first | changes, {**first, "id": 5, "content": "<|im_start|>"}]
    template = [{"Sequence" if t == "A" else "SpecialToken": {"id": t, "type_id": 0}} for t in single]
    ids = {"<|im_end|>": 4, "<|im_start|>": 5}
    values["post_processor"] = {
        "type": "TemplateProcessing", "single": template, "pair": template,
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in single if t in ids},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


def test_beginning_and_end_are_the_tokenizers(tmp_path: Path) -> None:
    """Which `config.json` may say otherwise: its own end tokens come after."""
    found = tokenizer_metadata(around(tmp_path, ["<|im_start|>", "A", "<|im_end|>"]), 6)
    assert [found[f"tokenizer.ggml.add_{kind}_token"] for kind in ("bos", "eos")] == [True, True]
    config = replace(preset("mixtral-8x7b"), attn_scale=0.0, bos_token_id=0, eos_token_ids=(1, 4, 2))
    places = {name: _place(name, config) for i in range(32) for name in (f"blk.{i}.attn_q.weight", "output.weight")}
    keys = gguf_metadata(config, found, places)
    ids = {kind: keys[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "eot", "eom")}
    assert ids == {"bos": 5, "eos": 4, "eot": 1, "eom": 2}


@pytest.mark.parametrize(
    ("single", "changes", "problem"),
    [
        (["A", "<|im_start|>"], {}, r"puts the tokens \(5,\) around a prompt: a GGUF file can only say eos=4"),
        (["<|im_start|>", "<|im_end|>", "A"], {}, r"puts the tokens \(5, 4\) .* only say bos=5"),
        (["A"], {"lstrip": True}, r"token '<\|im_end\|>' has lstrip, which a GGUF file cannot say"),
        (["A"], {"rstrip": True, "single_word": True}, "has rstrip, single_word"),
        (["A"], {"id": 7}, "the tokenizer has 8 tokens, expected at most the model's 6"),
    ],
)
def test_what_a_gguf_tokenizer_has_not(
    single: list[str], changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        tokenizer_metadata(around(tmp_path, single, **changes), 6)


def test_without_a_tokenizer_there_is_none(tmp_path: Path) -> None:
    path = convert(HF / "mixtral-a", tmp_path / "out.gguf", format="gguf")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert load_tokenizer(path) is None
