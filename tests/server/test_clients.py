"""The server as the clients of others see it: openai, langchain-openai, litellm, lm-eval and curl.

Needs the extra `clients`: `make more` has an environment with it. The model ships with the project; its chats have a
template that spells tool calls, so that what it is made to say can be parsed.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from grok_engine import LLM, SamplingParams
from tests.engine.judged import TEXT, write_llama

if not os.environ.get("GROK_TEST_MORE"):
    pytest.importorskip("openai", reason="the clients are not installed: `make more` runs these")

import openai
from pydantic import BaseModel, ConfigDict

KEY, NAME = "a-key", "watson"
TEMPLATE = (
    "{% if tools %}Tools:{% for t in tools %} {{ t | tojson }}{% endfor %}\n"
    'Answer with <tool_call>\n{"name": …, "arguments": …}\n</tool_call>\n{% endif %}'
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK: list[Any] = [{"role": "user", "content": "Who did it, Watson?"}]
SURE: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


class Verdict(BaseModel):
    """What somebody is thought to have done."""

    model_config = ConfigDict(extra="forbid")

    who: Literal["Holmes", "Watson", "Moriarty"]
    guilty: bool


def serving(model: str, folder: Path, *options: str) -> Iterator[str]:
    """The address of a server for `model`, in a process of its own."""
    command = (sys.executable, "-m", "grok_engine.cli", "serve", model, "--port", "0", "--quiet", *options)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            assert said.startswith("listening on "), (folder / "log").read_text()
            yield said.split()[-1] + "/v1"
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "template").write_text(TEMPLATE)
    yield from serving(
        "tiny", folder, "--api-key", KEY, "--served-model-name", NAME, "--chat-template", str(folder / "template")
    )


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    with LLM("tiny", max_num_seqs=1) as llm:
        yield llm


# openai


def test_openai_completions(client: openai.OpenAI, alone: LLM) -> None:
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve(NAME).id) == (NAME, NAME)
    prompts = ["My dear Watson,", "It was"]
    want = [o.outputs[0] for o in alone.generate(prompts, SamplingParams(temperature=0, max_tokens=24))]
    found = client.completions.create(model=NAME, prompt=prompts, logprobs=2, **SURE)
    assert [choice.text for choice in found.choices] == [answer.text for answer in want]
    assert found.usage is not None
    assert found.usage.completion_tokens == sum(len(answer.token_ids) for answer in want)
    assert found.choices[0].logprobs is not None
    assert len(found.choices[0].logprobs.token_logprobs or ()) == len(want[0].token_ids)
    ids = client.completions.create(model=NAME, prompt=alone.encode(prompts[0], add_special_tokens=True), **SURE)
    assert ids.choices[0].text == want[0].text
    chunks = list(client.completions.create(model=NAME, prompt=prompts[0], stream=True, echo=True, **SURE))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == prompts[0] + want[0].text


def test_openai_chats(client: openai.OpenAI, alone: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    want = alone.chat(TALK, params, chat_template=TEMPLATE)[0]
    found = client.chat.completions.create(model=NAME, messages=TALK, logprobs=True, top_logprobs=3, **SURE)
    answer = want.outputs[0]
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (answer.text, answer.finish_reason)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (
        len(want.prompt_token_ids), len(answer.token_ids),
    )  # fmt: skip
    assert found.choices[0].logprobs is not None
    assert len(found.choices[0].logprobs.content or ()) == len(answer.token_ids)
    usage: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=NAME, messages=TALK, stream=True, stream_options=usage, **SURE))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == answer.text
    assert chunks[-1].usage == found.usage.model_copy(update={"prompt_tokens_details": chunks[-1].usage and
                                                              chunks[-1].usage.prompt_tokens_details})  # fmt: skip
    with client.chat.completions.stream(model=NAME, messages=TALK, stop=" ", **SURE) as stream:  # it raises at "length"
        final = stream.get_final_completion().choices[0].message.content
    assert final == answer.text[: answer.text.index(" ")]
    several = client.chat.completions.create(
        model=NAME,
        messages=TALK,
        n=3,
        max_completion_tokens=5,
        seed=4,
        user="u",
        extra_body={"top_k": 40, "min_p": 0.01},
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2]


def test_openai_errors(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.chat.completions.create(model="other", messages=TALK)
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        client.chat.completions.create(model=NAME, messages=TALK, temperature=-1)
    assert (refused.value.param, refused.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="temprature"):
        client.chat.completions.create(model=NAME, messages=TALK, stream=True, extra_body={"temprature": 1})
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=url, api_key="wrong").models.list()


def test_openai_structured_answers(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": NAME, "messages": TALK, "temperature": 0, "max_tokens": 60}
    found = client.chat.completions.parse(**ask, response_format=Verdict)
    assert isinstance(found.choices[0].message.parsed, Verdict)
    with client.chat.completions.stream(**ask, response_format=Verdict) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == found.choices[0].message.parsed


def test_openai_tools(client: openai.OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Verdict, name="accuse")]
    ask: dict[str, Any] = {"model": NAME, "messages": TALK, "tools": tools, "temperature": 0, "max_tokens": 120}
    ask["parallel_tool_calls"] = False
    for choice in ("required", {"type": "function", "function": {"name": "accuse"}}):
        found = client.chat.completions.parse(**ask, tool_choice=choice).choices[0]
        (call,) = found.message.tool_calls or ()
        assert call.function.name == "accuse"
        assert isinstance(call.function.parsed_arguments, Verdict)
        with client.chat.completions.stream(**ask, tool_choice=choice) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert [c.function.arguments for c in streamed.message.tool_calls or ()] == [call.function.arguments]
        assert streamed.finish_reason == found.finish_reason
    said: Any = {"role": "assistant", "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})]}
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "He confessed."}
    talk = [*TALK, said, result]
    assert client.chat.completions.create(**{**ask, "messages": talk}, tool_choice="none").choices[0].message.content


def test_openai_async(url: str, alone: LLM) -> None:
    """Many streams at once, some of them left, give what each gives alone."""
    prompts = [f"Chapter {i}." for i in range(12)]
    want = [o.outputs[0].text for o in alone.generate(prompts, SamplingParams(temperature=0, max_tokens=24))]

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        text = ""
        stream = await client.completions.create(model=NAME, prompt=prompts[i], stream=True, **SURE)
        async for chunk in stream:
            text += chunk.choices[0].text
            if i % 4 == 3:
                await stream.close()
                break
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as client:
            return await asyncio.gather(*(one(client, i) for i in range(len(prompts))))

    for i, text in enumerate(asyncio.run(all_of_them())):
        assert want[i].startswith(text) if i % 4 == 3 else text == want[i]


# Others


def test_langchain(url: str, client: openai.OpenAI) -> None:
    from langchain_openai import ChatOpenAI

    said = client.chat.completions.create(model=NAME, messages=TALK, **SURE).choices[0].message.content
    chat: Any = ChatOpenAI(base_url=url, api_key=KEY, model=NAME, temperature=0, max_tokens=24)  # type: ignore[arg-type]
    whole = chat.invoke(TALK[0]["content"])
    assert whole.content == said
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(TALK[0]["content"])) == said
    assert [m.content for m in chat.batch([TALK[0]["content"]] * 3)] == [said] * 3
    more: Any = ChatOpenAI(base_url=url, api_key=KEY, model=NAME, temperature=0, max_tokens=120)  # type: ignore[arg-type]
    assert isinstance(more.with_structured_output(Verdict).invoke("Who?"), Verdict)
    (call,) = more.bind_tools([Verdict], tool_choice="any", parallel_tool_calls=False).invoke("Who?").tool_calls
    assert call["name"] == "Verdict"
    assert Verdict(**call["args"])


def test_litellm(url: str, client: openai.OpenAI) -> None:
    import litellm

    said = client.chat.completions.create(model=NAME, messages=TALK, **SURE).choices[0].message.content
    there: dict[str, Any] = {"api_base": url, "api_key": KEY, "model": f"openai/{NAME}", **SURE}
    whole = litellm.completion(messages=TALK, **there)
    assert whole.choices[0].message.content == said
    chunks = litellm.completion(messages=TALK, stream=True, **there)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    text = litellm.text_completion(prompt="It was", **{**there, "model": f"text-completion-openai/{NAME}"})
    assert text.choices[0].text == client.completions.create(model=NAME, prompt="It was", **SURE).choices[0].text
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion(messages=TALK, **{**there, "model": "openai/other"})


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(url: str, client: openai.OpenAI) -> None:
    def curl(*arguments: str) -> str:
        command = ("curl", "-sS", "--max-time", "30", *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    root, key = url.removesuffix("/v1"), ("-H", f"Authorization: Bearer {KEY}")
    assert curl("-o", "/dev/null", "-w", "%{http_code}", f"{root}/health") == "200"
    assert json.loads(curl(f"{url}/models"))["error"]["code"] == "invalid_api_key"
    body = json.dumps({"model": NAME, "messages": TALK, "stream": True, **SURE})
    lines = curl("-N", *key, "--json", body, f"{url}/chat/completions").splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    assert text == client.chat.completions.create(model=NAME, messages=TALK, **SURE).choices[0].message.content


def test_lm_eval(tmp_path: Path) -> None:
    """`local-completions` scores and generates as the adapter for the engine does, in this process."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    import lm_eval
    from lm_eval.tasks import TaskManager

    import grok_engine.tools.lm_eval  # noqa: F401  registers the model

    folder = tmp_path / "model"
    write_llama(folder)
    docs = [{"text": TEXT[i : i + 30], "choices": [TEXT[i + 30 : i + 40], " no"], "answer": 0} for i in (0, 30, 60)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}}}
    common = {"test_split": "test", "doc_to_text": "{{text}}", **data}
    tasks: list[Any] = [
        {
            "task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}], **common,
        },
        {
            "task": "generation", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}], **common,
        },
    ]  # fmt: skip
    served = serving(str(folder), tmp_path, "--served-model-name", NAME, "--dtype", "float32")
    address = next(served)
    there = {
        "model": NAME, "base_url": f"{address}/completions", "tokenizer": str(folder), "num_concurrent": 3,
        "tokenized_requests": False, "max_retries": 1,
    }  # fmt: skip
    options: dict[str, Any] = {
        "tasks": tasks, "task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0,
    }  # fmt: skip
    try:
        found = [
            lm_eval.simple_evaluate(model, model_args=arguments, **options)
            for model, arguments in {
                "local-completions": there,
                "grok_engine": {"pretrained": str(folder), "dtype": "float32"},
            }.items()
        ]
    finally:
        assert next(served, None) is None
    said = [[s["resps"] for task in ("choice", "generation") for s in f["samples"][task]] for f in found]
    assert len(said[0]) == 6
    assert said[0][3:] == said[1][3:]
    for theirs, ours in zip(said[0][:3], said[1][:3], strict=True):
        for ((a, greedy_a),), ((b, greedy_b),) in zip(theirs, ours, strict=True):
            assert math.isclose(float(a), float(b), abs_tol=1e-3)
            assert bool(greedy_a) == bool(greedy_b)
