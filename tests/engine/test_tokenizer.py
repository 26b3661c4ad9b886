from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from grok_engine.tokenizer.base import IncrementalDetokenizer, PaddedTokenizer, Surface, Tokenizer
from grok_engine.tokenizer.hf import HFTokenizer
from grok_engine.tokenizer.load import load_tokenizer, tokenizer_files
from grok_engine.tokenizer.sentencepiece import SentencePieceTokenizer

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/data/tokenizer_golden.json").read_text(encoding="utf-8"))
GROK = Path(os.environ.get("GROK_TOKENIZER", ROOT.parent / "shared/data/tokenizer.model"))
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and then it jumps again.",
    "Ein süßer Käse für zwölf Mäuse; où est le garçon?",
    "def add(a, b):\n    return a + b  # two spaces before the comment",
    "In 1984 and 2001 there were 365 days in each year, or so they said.",
]


def train(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", user_defined_symbols=["<|sep|>", "  "],
        minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def byte_level(path: Path) -> Path:
    tk = tokenizers.Tokenizer(models.BPE())
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|bos|>", "<|eos|>"]
    tk.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    tk.add_tokens([AddedToken("two words", special=False), AddedToken("é", special=False)])
    tk.save(str(path))
    return path


def byte_fallback(path: Path) -> Path:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁▁", "a", "▁a", "é", "▁猫", "<0xZZ>"]
    tk = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tk.add_special_tokens(["<s>", "</s>"])
    tk.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tk.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tk.save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    train(root / "plain.model", remove_extra_whitespaces=False)
    train(root / "no_dummy.model", remove_extra_whitespaces=False, add_dummy_prefix=False)
    train(root / "squeezed.model", remove_extra_whitespaces=True)
    train(root / "squeezed_no_dummy.model", remove_extra_whitespaces=True, add_dummy_prefix=False, bos_id=-1, eos_id=-1)
    byte_level(root / "byte_level.json")
    byte_fallback(root / "byte_fallback.json")
    return root


KINDS = [
    "plain.model", "no_dummy.model", "squeezed.model", "squeezed_no_dummy.model", "byte_level.json",
    "byte_fallback.json",
]  # fmt: skip


def opened(path: Path) -> Tokenizer:
    return SentencePieceTokenizer(path) if path.suffix == ".model" else HFTokenizer(path)


def pushed(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    stream = IncrementalDetokenizer(tokenizer)
    for token_id in ids:
        yield stream.push(token_id)
    yield stream.finish()


@pytest.fixture(scope="module")
def grok() -> SentencePieceTokenizer:
    if not GROK.is_file():
        pytest.skip(f"Grok-1's tokenizer.model is not at {GROK}: set GROK_TOKENIZER to its place")
    return SentencePieceTokenizer(GROK)


def test_grok_ids(grok: SentencePieceTokenizer) -> None:
    assert (grok.vocab_size, grok.bos_token_id, grok.eos_token_ids) == (131072, 1, (2,))


@pytest.mark.parametrize("item", GOLDEN["items"], ids=lambda item: repr(item["text"][:20]))
def test_grok_encodes_and_decodes_as_recorded(grok: SentencePieceTokenizer, item: dict[str, Any]) -> None:
    assert grok.encode(item["text"]) == item["ids"]
    assert grok.decode(item["ids"]) == item["decoded"] == "".join(pushed(grok, item["ids"]))
    assert (item["decoded"] == item["text"]) is item["roundtrip"]


def test_grok_decodes_each_recorded_id_and_sequence(grok: SentencePieceTokenizer) -> None:
    cases = [([c["id"]], c["decoded"]) for c in GOLDEN["single_id_decode"]]
    cases += [(c["ids"], c["decoded"]) for c in GOLDEN["sequence_decode"]]
    assert len(cases) == 316
    for ids, decoded in cases:
        assert grok.decode(ids) == decoded == "".join(pushed(grok, ids)), ids


def test_grok_streams_any_ids(grok: SentencePieceTokenizer) -> None:
    # 130089 is the lone space, which vanishes at the start
    low = st.integers(0, 330)  # control, unknown, user-defined and byte pieces

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(low | st.integers(0, 131071) | st.just(130089)))
    def check(ids: list[int]) -> None:
        assert "".join(pushed(grok, ids)) == grok.decode(ids)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_concatenates_to_the_whole(folder: Path, kind: str) -> None:
    tokenizer = opened(folder / kind)
    textless = {i for i in range(tokenizer.vocab_size) if not tokenizer.surface(i, True).text}
    everything = st.integers(0, tokenizer.vocab_size - 1)

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.lists(everything | st.integers(0, 260) | st.sampled_from(sorted(textless)), max_size=30))
    def check(ids: list[int]) -> None:
        assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("kind", ["plain.model", "no_dummy.model", "byte_level.json"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_comes_back(folder: Path, kind: str, text: str) -> None:
    tokenizer = opened(folder / kind)
    # U+2581 is how a space is spelled; the added token é is spelled like a byte, and in the library, too, read as one.
    text = text.replace("▁", " ") if kind.endswith(".model") else text.replace("é", "e")
    assert "".join(pushed(tokenizer, tokenizer.encode(text))) == text


def test_byte_level_decodes_as_the_library_does(folder: Path) -> None:
    path = folder / "byte_level.json"
    ours, theirs = HFTokenizer(path), tokenizers.Tokenizer.from_file(str(path))

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    def check(ids: list[int]) -> None:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    check()
    assert ours.decode([ours.vocab_size - 1]) == "two words"


def test_byte_fallback_decodes_as_the_library_does(folder: Path) -> None:
    path = folder / "byte_fallback.json"
    ours, theirs = HFTokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    pieces = st.lists(st.sampled_from([0, 1, 2, *range(259, ours.vocab_size)]), max_size=4)
    spelled = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=3).map(
        lambda text: [3 + byte for byte in text.encode()]
    )

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(st.lists(pieces | spelled, max_size=8).map(lambda runs: [i for run in runs for i in run]))
    def check(ids: list[int]) -> None:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    check()
    # where they part: one wrong byte costs there the good character before it
    cat = [3 + byte for byte in "猫".encode()]
    assert ours.decode([*cat, 3 + 0xFF]) == "猫\ufffd"
    assert theirs.decode([*cat, 3 + 0xFF]) == "\ufffd" * 4


@pytest.mark.parametrize("kind", ["byte_level.json", "byte_fallback.json"])
def test_control_tokens_are_shown_where_asked(folder: Path, kind: str) -> None:
    ours, theirs = HFTokenizer(folder / kind), tokenizers.Tokenizer.from_file(str(folder / kind))
    spelled = {token: text for text, token in ours.control.ids.items()}
    for text in ("two words", "é猫", ""):
        for token in spelled:
            ids = [*ours.encode(text), token, *ours.encode(text), token]
            stream = IncrementalDetokenizer(ours, spelled)
            shown = "".join(map(stream.push, ids)) + stream.finish()
            assert shown == theirs.decode(ids, skip_special_tokens=False)
            assert shown.endswith(spelled[token])


@pytest.mark.parametrize(("kind", "broken"), [("plain.model", "\ufffd" * 2), ("byte_level.json", "\ufffd")])
def test_a_character_comes_whole_or_as_replacements(folder: Path, kind: str, broken: str) -> None:
    tokenizer = opened(folder / kind)
    byte = {}
    for i in range(tokenizer.vocab_size):
        data = tokenizer.surface(i, False).data
        if len(data) == 1:
            byte.setdefault(data[0], i)
    cat = [byte[b] for b in "猫".encode()]
    assert list(pushed(tokenizer, cat)) == ["", "", "猫", ""]
    assert list(pushed(tokenizer, cat[:2])) == ["", "", broken]
    assert list(pushed(tokenizer, [*cat[:2], byte[0x41]])) == ["", "", broken + "A", ""]
    assert list(pushed(tokenizer, [byte[0xFF], *cat])) == ["\ufffd", "", "", "猫", ""]


def test_control_tokens_are_silent_and_the_dummy_space_goes_once(folder: Path) -> None:
    tokenizer = SentencePieceTokenizer(folder / "plain.model")
    the = tokenizer.encode("The")
    assert next(pushed(tokenizer, [1, *the])) == ""
    assert "".join(pushed(tokenizer, [1, *the, 2, *the])) == "The The"
    assert tokenizer.encode("</s>") != [2]
    assert tokenizer._sp.PieceToId("<|sep|>") in tokenizer.encode("a<|sep|>b")


def test_each_token_is_looked_at_once(folder: Path) -> None:
    class Counting(SentencePieceTokenizer):
        seen = 0

        def surface(self, token_id: int, at_start: bool) -> Surface:
            self.seen += 1
            return super().surface(token_id, at_start)

        def decode(self, ids: Any) -> str:
            raise AssertionError("a stream decodes nothing again")

    tokenizer = Counting(folder / "plain.model")
    stream = IncrementalDetokenizer(tokenizer)
    for i in range(2000):
        stream.push(3 + (0xF0, 0x9F, 0x98, 0x80, 0xE4)[i % 5])
        assert len(stream._pending) <= 3
    assert tokenizer.seen == 2000


@pytest.mark.parametrize("kind", ["plain.model", "byte_level.json", "byte_fallback.json"])
def test_ids_out_of_range_and_surrogates_are_refused(folder: Path, kind: str) -> None:
    tokenizer = opened(folder / kind)
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"{bad} is not in 0\.\.{tokenizer.vocab_size - 1}"):
            tokenizer.decode([0, bad])
        with pytest.raises(ValueError, match=str(bad)):
            IncrementalDetokenizer(tokenizer).push(bad)
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800")


def test_bos_and_eos_come_from_the_files(folder: Path, tmp_path: Path) -> None:
    plain, without = (SentencePieceTokenizer(folder / n) for n in ("plain.model", "squeezed_no_dummy.model"))
    assert (plain.bos_token_id, plain.eos_token_ids) == (1, (2,))
    assert (without.bos_token_id, without.eos_token_ids) == (None, ())
    path = byte_level(tmp_path / "tokenizer.json")
    assert HFTokenizer(path).eos_token_ids == ()
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>", "special": true}}')
    assert (HFTokenizer(path).bos_token_id, HFTokenizer(path).eos_token_ids) == (0, (1,))
    for bad in ('{"eos_token": "<nowhere>"}', "[]", "{"):
        config.write_text(bad)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            HFTokenizer(path)


AROUND = {
    "none": (None, [], []),
    "bos": ("<|bos|> $A", [0], []),
    "eos": ("$A <|eos|>", [], [1]),
    "both": ("<|bos|> $A <|eos|>", [0], [1]),
    "two": ("<|eos|> <|bos|> $A", [1, 0], []),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_post_processor_says_what_goes_around_a_prompt(folder: Path, tmp_path: Path, name: str) -> None:
    """As AutoTokenizer has it, which ignores add_bos_token and add_eos_token beside a tokenizer.json."""
    template, prefix, suffix = AROUND[name]
    tk = tokenizers.Tokenizer.from_file(str(folder / "byte_level.json"))
    if template:
        specials = [("<|bos|>", 0), ("<|eos|>", 1)]
        steps = [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(template, None, specials)]
        tk.post_processor = processors.Sequence(steps) if name == "both" else steps[1]
    tk.enable_truncation(4)
    tk.enable_padding(length=50)
    tk.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": not prefix, "add_eos_token": not suffix}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 10**30}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert ([*tokenizer.prefix], [*tokenizer.suffix]) == (prefix, suffix)
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SENTENCES:
        found = [*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix]
        assert found == judge(text, truncation=False, padding=False).input_ids
    assert tokenizer.encode("<|bos|>") != [0]
    assert PaddedTokenizer(tokenizer, 1000).prefix == tokenizer.prefix


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_prompt_of_llama_2_is_as_transformers_has_it(folder: Path, tmp_path: Path, kind: str) -> None:
    tk = tokenizers.Tokenizer.from_file(str(folder / "byte_fallback.json"))
    tk.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1), ("</s>", 2)])
    tk.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SENTENCES:
        assert [*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix] == judge(text).input_ids
    assert tokenizer.prefix == (1,)


def test_other_post_processors_are_refused(folder: Path, tmp_path: Path) -> None:
    tk = tokenizers.Tokenizer.from_file(str(folder / "byte_level.json"))
    tk.post_processor = processors.TemplateProcessing("$A <|bos|> $A", None, [("<|bos|>", 0)])
    tk.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the post-processor does more than to put tokens before"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "prefix", "suffix"),
    [
        ({}, (), ()),  # Grok-1's release
        ({"config.json": {"model_type": "grok-1"}}, (), ()),
        ({"config.json": {"model_type": "llama"}}, (1,), ()),
        ({"config.json": {"model_type": "mixtral"}, "tokenizer_config.json": {}}, (1,), ()),
        ({"params.json": {"dim": 8}}, (1,), ()),
        ({"config.json": {"model_type": "mistral"}, "tokenizer_config.json": {"add_bos_token": False}}, (), ()),
        ({"tokenizer_config.json": {"add_bos_token": True, "add_eos_token": True}}, (1,), (2,)),
    ],
)
def test_what_goes_around_a_prompt_beside_a_tokenizer_model(
    folder: Path, tmp_path: Path, files: dict[str, Any], prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> None:
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    (tmp_path / "tokenizer.model").write_bytes((folder / "plain.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.prefix, tokenizer.suffix) == (prefix, suffix)
    copied = tmp_path / "copied"  # a conversion's, whose configuration names no family
    copied.mkdir()
    for name, content in tokenizer_files(tmp_path).items():
        (copied / name).write_bytes(content)
    again = load_tokenizer(copied)
    assert again is not None
    assert (again.prefix, again.suffix) == (prefix, suffix)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": "yes"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: add_bos_token='yes' is not true or false"):
        load_tokenizer(tmp_path)


def test_no_bos_where_a_model_has_none(folder: Path) -> None:
    tokenizer = SentencePieceTokenizer(folder / "squeezed_no_dummy.model", add_bos=True, add_eos=True)
    assert (tokenizer.prefix, tokenizer.suffix) == ((), ())


def test_load_finds_what_a_folder_has(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes((folder / "plain.model").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    (tmp_path / "tokenizer.json").write_bytes((folder / "byte_level.json").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), HFTokenizer)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_what_is_no_file_is_not_taken_for_none(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "byte_level.json").read_bytes())
    path = tmp_path / name
    path.unlink(missing_ok=True)
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("nowhere"), lambda: _sparse(path)):
        make()
        if not (name == "tokenizer.model" and (tmp_path / "tokenizer.json").exists()):
            with pytest.raises(ValueError, match=rf"{name} (is not a file|has 1,0.* bytes)"):
                load_tokenizer(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("content", [b"", b"not a tokenizer", b"{}"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_corrupt_or_missing_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    with pytest.raises(ValueError, match=name):
        opened(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path)


def test_an_unknown_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "byte_level.json").read_text(encoding="utf-8"))
    values["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="WordPiece"):
        load_tokenizer(tmp_path)
