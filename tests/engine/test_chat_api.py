"""LLM.chat, AsyncLLM.chat and apply_chat_template: conversations in, the outputs of their token ids out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import tokenizers

from grok_engine import LLM, AsyncLLM, EngineConfig, LLMEngine, ModelConfig, SamplingParams
from grok_engine.loading.build import build_tokenizer
from grok_engine.tokenizer.chat_files import load_chat
from grok_engine.tokenizer.load import load_tokenizer

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}assistant:{% endif %}"
TALK = [{"role": "user", "content": "My dear Watson,"}]
OTHER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The king"}]
TEXT = "user: My dear Watson,\nassistant:"
PARAMS = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", max_model_len=256) as llm:
        yield llm


def test_a_chat_is_a_prompt(llm: LLM) -> None:
    (output,) = llm.chat(TALK, PARAMS, chat_template=TEMPLATE)
    (wanted,) = llm.generate({"prompt_token_ids": llm.encode(TEXT)}, PARAMS)
    assert output.prompt_token_ids == wanted.prompt_token_ids
    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
    ids = llm.apply_chat_template(TALK, chat_template=TEMPLATE)
    assert ids == wanted.prompt_token_ids
    assert [chunk.token_id for chunk in llm.stream(ids, PARAMS)] == wanted.outputs[0].token_ids


def test_several_conversations(llm: LLM) -> None:
    outputs = llm.chat([TALK, OTHER], [PARAMS, SamplingParams(max_tokens=3, temperature=0)], chat_template=TEMPLATE)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [6, 3]
    assert [o.prompt_token_ids for o in outputs] == [
        llm.apply_chat_template(talk, chat_template=TEMPLATE) for talk in (TALK, OTHER)
    ]
    with pytest.raises(ValueError, match=r"conversations\[1\]: messages\[0\] has role None"):
        llm.chat([TALK, [{"content": "x"}]], PARAMS, chat_template=TEMPLATE)
    with pytest.raises(ValueError, match=r"^messages is empty"):
        llm.chat([], PARAMS, chat_template=TEMPLATE)


def test_the_last_message_goes_on(llm: LLM) -> None:
    talk = [*TALK, {"role": "assistant", "content": "I saw"}]
    ids = llm.apply_chat_template(
        talk, chat_template=TEMPLATE, add_generation_prompt=False, continue_final_message=True
    )
    assert ids == llm.encode("user: My dear Watson,\nassistant: I saw")


def test_what_cannot_fit_is_not_encoded(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"the conversation has 1000\d+ bytes, more than fit into the model's context"):
        llm.chat([{"role": "user", "content": "x" * 1_000_000}], PARAMS, chat_template=TEMPLATE)
    with pytest.raises(ValueError, match=r"prompt has \d+ tokens, expected at most max_model_len=256"):
        llm.chat([{"role": "user", "content": "x " * 400}], PARAMS, chat_template=TEMPLATE)


def test_control_tokens_in_a_text(llm: LLM) -> None:
    spelled, token = next(iter(llm.tokenizer.control.ids.items()))  # type: ignore[union-attr]
    params = SamplingParams(max_tokens=3, allowed_token_ids=[token], ignore_eos=True)
    for skip, wanted in ((True, ""), (False, spelled * 3)):
        (output,) = llm.generate("The king", replace(params, skip_special_tokens=skip))
        assert output.outputs[0].text == wanted


def test_models_that_have_no_turns(llm: LLM) -> None:
    with pytest.raises(ValueError, match="tiny has no chat template; it is a base model, which continues text, unless"):
        llm.chat(TALK, PARAMS)
    with pytest.raises(ValueError, match="tiny has no chat template"):
        AsyncLLM(llm.engine).chat_template()
    assert AsyncLLM(llm.engine).chat_template(TEMPLATE) == TEMPLATE
    engine = LLMEngine(_small(), num_pages=8)
    with pytest.raises(ValueError, match="the model has no tokenizer, so it cannot be talked to"):
        engine.apply_chat_template(TALK)
    engine.close()


def _small() -> ModelConfig:
    return ModelConfig(
        vocab_size=64, d_model=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=2,
        num_experts_per_tok=2, d_ff=32, max_position=64,
    )  # fmt: skip


def test_in_asyncio() -> None:
    async def run() -> tuple[list[int], str | None]:
        async with AsyncLLM(LLMEngine("tiny", max_model_len=256)) as llm:
            with pytest.raises(ValueError, match="no chat template"):
                llm.chat(TALK, PARAMS)
            async for output in llm.chat(TALK, PARAMS, "a", chat_template=TEMPLATE, timeout=60):
                last = output
            assert last.request_id == "a"
            assert last.prompt_token_ids == llm.apply_chat_template(TALK, chat_template=TEMPLATE)
            return last.outputs[0].token_ids, last.outputs[0].finish_reason

    tokens, reason = asyncio.run(run())
    assert (len(tokens), reason) == (6, "length")


def test_an_answer_of_grok_2_ends_with_its_turn(tmp_path: Path) -> None:
    tk = tokenizers.Tokenizer(tokenizers.models.BPE({chr(97 + i): i for i in range(26)}, []))
    tk.decoder = tokenizers.decoders.ByteLevel()
    config = EngineConfig(model=_small())

    def ends() -> tuple[int, ...]:
        tk.save(str(tmp_path / "tokenizer.json"))
        return build_tokenizer(tmp_path, config)[1].model.eos_token_ids

    assert ends() == (2,)
    tk.add_special_tokens(["<|separator|>"])
    assert ends() == (2,)
    tk.add_special_tokens(["<|eos|>"])
    assert ends() == (2, 26, 27)
    assert build_tokenizer(None, config) == (None, config)


def test_a_gguf_file_has_templates_with_names(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    alphabet = [*(chr(c) for c in range(33, 127)), "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*alphabet, "<|end|>"])
    writer.add_token_types([1] * len(alphabet) + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(len(alphabet))
    writer.add_chat_template(
        [{"name": "default", "template": "{{ eos_token }}a"}, {"name": "tool_use", "template": "{{ eos_token }}b"}]
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    chat = load_chat(tmp_path / "m.gguf", tokenizer)
    assert set(chat.templates) == {"default", "tool_use"}
    assert chat.encode(TALK) == [len(alphabet), alphabet.index("a")]
    assert chat.encode(TALK, tools=[{"type": "function"}]) == [len(alphabet), alphabet.index("b")]
