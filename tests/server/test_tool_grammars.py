"""What answers the grammars of tools and formats admit, and which requests are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from grok_engine import StructuredOutput
from grok_engine.sampling.grammar_limits import GrammarLimits
from grok_engine.sampling.structured import StructuredCompiler
from grok_engine.server.structured import structured_output
from grok_engine.server.tool_styles import STYLES, ToolStyle
from grok_engine.server.tools import Constraint, constraint
from grok_engine.tokenizer.base import IncrementalDetokenizer
from grok_engine.tokenizer.hf import HFTokenizer
from tests.server.test_tool_calls import Found, read

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

CONTROL = ["<s>", "</s>", "[THINK]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "[OTHER]"]
CLOSING = '"}]>'


class Model:
    """A tokenizer whose tokens are bytes, control tokens, and one more, <tool_call>."""

    def __init__(self, folder: Path) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tk = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
        tk.pre_tokenizer, tk.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tk.add_special_tokens(CONTROL)
        tk.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
        tk.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
        self.tokenizer = HFTokenizer(folder / "tokenizer.json")
        limits = GrammarLimits(max_bytes=65536, max_depth=100, max_rules=1000, seconds=60.0)
        self.eos = self.tokenizer.eos_token_ids
        self.compiler = StructuredCompiler(self.tokenizer, self.tokenizer.vocab_size, self.eos, limits)
        surfaces = [self.tokenizer.surface(token, False) for token in range(self.tokenizer.vocab_size)]
        self.closing = [token for token, s in enumerate(surfaces) if (s.data or b"~") in CLOSING.encode()]

    def style(self, name: str) -> ToolStyle:
        return STYLES[name].of_model(self.tokenizer.control.ids)

    def admits(self, structured: StructuredOutput | None, text: str) -> bool | None:
        """Whether the text matches; None if it may still become one that does."""
        assert structured is not None
        matcher = self.compiler.matcher(structured)
        for token in self.tokenizer.encode(text, special=True):
            if not matcher.allowed()[token // 8] >> (token % 8) & 1:
                return False
            matcher.accept(token)
        return matcher.complete or None

    def sample(self, structured: StructuredOutput | None, seed: int, likely: str = "") -> str:
        """A random text that matches, with its control tokens. likely: what has to come sooner or later."""
        assert structured is not None
        matcher, generator = self.compiler.matcher(structured), np.random.default_rng(seed)
        stream = IncrementalDetokenizer(self.tokenizer, {i: t for t, i in self.tokenizer.control.ids.items()})
        text = ""
        for _ in range(2000):
            bits = np.unpackbits(matcher.allowed(), bitorder="little")[: self.tokenizer.vocab_size]
            weights = bits * 1.0
            weights[[*self.closing, *self.eos]] *= 60  # random text would end late
            weights[self.tokenizer.encode(likely, special=True)] *= 60
            token = int(generator.choice(len(bits), p=weights / weights.sum()))
            if token in self.eos:
                return text + stream.finish()
            matcher.accept(token)
            text += stream.push(token)
        raise AssertionError(f"no end: {text[:200]}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("tokenizer"))


PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"],
         "additionalProperties": False}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "finds", "parameters": PLACE}},
    {"type": "function", "function": {"name": "g.h-2", "strict": True}},
]
NAMED = {"type": "function", "function": {"name": "f"}}
F = '{"place": "Łó \\" }"}'
# One call, a second one behind it, and one of a function that is not there.
SPELLED = {
    "hermes": ('<tool_call>\n{"name": "f", "arguments": ' + F + '}\n</tool_call>',
               '\n<tool_call>\n{"name": "g.h-2", "arguments": {}}\n</tool_call>', '<tool_call>\n{"name": "q'),
    "hermes_list": ('<tool_call>[{"name": "f", "arguments": ' + F + '}', ', {"name": "g.h-2", "arguments": {}}',
                    '<tool_call>[{"name": "q'),
    "mistral": ('[TOOL_CALLS] [{"name": "f", "arguments": ' + F + ', "id": "abcdefghi"}',
                ',{"name":"g.h-2", "arguments":{}}', '[TOOL_CALLS][{"name": "q'),
    "mistral_v11": ("[TOOL_CALLS]f[ARGS]" + F, "[TOOL_CALLS]g.h-2[CALL_ID]123456789[ARGS]{}", "[TOOL_CALLS]q"),
    "llama3_json": ('{"name": "f", "parameters": ' + F + '}', None, '{"name": "q'),
    "plain": ('{"name": "f", "arguments": ' + F + '}', None, '{"name": "q'),
}  # fmt: skip
AFTER = {"hermes_list": "]</tool_call>", "mistral": "]"}


def asked(model: Model, name: str, choice: Any, many: bool | None = None) -> Constraint:
    style = None if name == "plain" else model.style(name)
    return constraint({"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": many}, style)


@pytest.mark.parametrize("name", SPELLED)
def test_which_answers_are_admitted(model: Model, name: str) -> None:
    one, more, unknown = SPELLED[name]
    after = AFTER.get(name, "")
    for choice in ("auto", "required", NAMED):
        if choice == "auto" and name == "plain":
            continue
        free = choice == "auto"
        structured = asked(model, name, choice).structured
        assert model.admits(structured, one + after)
        assert model.admits(structured, unknown) is False
        assert model.admits(structured, "") is (True if free else None)
        assert model.admits(structured, "Hello, {you} <tool\n 😀") is free
        assert model.admits(structured, "[THINK]hm[OTHER] Yes") is free
        if more:
            assert model.admits(structured, one + more + after) is (choice != NAMED)
            assert model.admits(asked(model, name, choice, False).structured, one + more + after) is False
            assert model.admits(structured, "Let me see.\n" + one + after) is free
        assert model.admits(structured, one.replace('"place"', '"plaice"')) is False
        assert model.admits(structured, one + after + "\nDone") is False


def schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "null", "enum", *(["object", "array", "anyOf"] if depth else [])]
    match rng.choice(kinds):
        case "object":
            return objects(rng, depth - 1)
        case "array":
            return {"type": "array", "items": schema(rng, depth - 1), "maxItems": 2}
        case "anyOf":
            return {"anyOf": [schema(rng, depth - 1), {"type": "null"}]}
        case "enum":
            return {"enum": [1, "a", "<tool_call>", None]}
        case "string":
            return {"type": "string", "maxLength": rng.choice([0, 5])}
        case kind:
            return {"type": kind}


def objects(rng: random.Random, depth: int) -> dict[str, Any]:
    keys = rng.sample(["a", 'q"', "é", "name", "arguments"], rng.randint(0, 3))
    properties = {key: schema(rng, depth) for key in keys}
    return {"type": "object", "properties": properties, "required": keys[:1], "additionalProperties": False}


@pytest.mark.parametrize("name", SPELLED)
def test_sampled_calls_are_read_and_fit_random_schemas(model: Model, name: str) -> None:
    rng = random.Random(7)
    for seed in range(8):
        schemas = {"f": objects(rng, 2), "g-2": objects(rng, 1)}
        tools = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in schemas.items()]
        style = None if name == "plain" else model.style(name)
        found = constraint({"tools": tools, "tool_choice": "required"}, style)
        assert found.skip_special_tokens is (name not in ("mistral", "mistral_v11", "llama3_json"))
        text = model.sample(found.structured, seed)
        assert found.style is not None
        calls, _ = read(found.style, *text)
        assert calls, text
        for kind, *call in calls:
            assert kind == "call", text
            jsonschema.validate(json.loads(call[1]), schemas[call[0]])


def test_auto_reads_what_it_admits(model: Model) -> None:
    """Whatever the model writes: text that holds no call, or calls of the tools."""
    for name in STYLES:
        found = asked(model, name, "auto")
        kinds = set()
        for seed in range(12):
            assert found.style is not None
            answer: Found = read(found.style, model.sample(found.structured, seed, found.style.begin))[0]
            kinds |= {kind for kind, *_ in answer}
            assert all(call[0] in ("f", "g.h-2") and json.loads(call[1]) is not None
                       for kind, *call in answer if kind == "call")  # fmt: skip
        assert kinds == {"text", "call"}


def test_tools_that_are_not_asked_for() -> None:
    for fields in ({}, {"tools": None}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
        assert constraint(fields, None) == Constraint()
    formatted = constraint({"tools": TOOLS, "tool_choice": "none", "guided_regex": "a+"}, None)
    assert formatted == Constraint(structured=StructuredOutput(regex="a+"), field="guided_regex")


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": fields}], "tool_choice": "required"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "f"}, "tools='f' is not a list"),
        ({"tools": [{"type": "web"}]}, r"tools\[0\]=\{'type': 'web'\}: expected an object of type function"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, r"tools\[1\].function.name='f' is there twice"),
        (function(name="a b"), r"tools\[0\].function.name='a b': expected 1 to 64 of"),
        (function(name="f", strict=1), r"tools\[0\].function.strict=1: expected true or false"),
        (function(name="f", parameters=[]), r"tools\[0\].function.parameters=\[\] is not a JSON schema"),
        (function(name="f", parameters={"type": "array"}), r"parameters.type='array': expected 'object'"),
        (function(name="f", parameters={"required": "a"}), "parameters.required='a' is not a list"),
        (function(name="f", parameters={"properties": ["a"]}), r"parameters.properties=\['a'\] is not an object"),
        ({"tools": [{"type": "function", "function": "f"}]}, r"tools\[0\].function='f' is not an object"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice='any': expected none, auto, required or a function"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "q"}}},
         "tool_choice.function.name='q' is not one of the tools: f, g.h-2"),
        ({"tool_choice": "required"}, "tool_choice='required' needs tools"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls='no': expected true or false"),
        ({"tools": TOOLS}, "tools with tool_choice='auto' need a chat template whose spelling of calls is known"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex and tools are both given"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex and guided_choice are both given"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "response_format and guided_json are both"),
        ({"response_format": {"type": "xml"}}, "response_format={'type': 'xml'}: expected an object with a type of"),
        ({"response_format": "json"}, "response_format='json': expected an object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema=None is not an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "json_schema.name='a b'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "json_schema.schema=None is not"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": 1}}},
         "json_schema.strict=1: expected true or false"),
        ({"guided_choice": []}, r"guided_choice=\[\] is not a list of at least one text"),
        ({"guided_choice": [1]}, r"guided_choice=\[1\] is not a list of at least one text"),
        ({"guided_regex": 1}, "guided_regex=1 is not text"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs has json, regex: expected one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs has structural_tag: expected one of"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object=False is not true"),
    ],
)  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        constraint(fields, None)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, StructuredOutput(regex="a")),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_schema={"type": "object"})),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": PLACE, "strict": True}}},
         StructuredOutput(json_schema=PLACE)),
        ({"guided_json": PLACE}, StructuredOutput(json_schema=PLACE)),
        ({"guided_json": "{}"}, StructuredOutput(json_schema="{}")),
        ({"guided_grammar": 'root ::= "a"'}, StructuredOutput(grammar='root ::= "a"')),
        ({"structured_outputs": {"json": PLACE, "regex": None}}, StructuredOutput(json_schema=PLACE)),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_schema={"type": "object"})),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(regex="a|b")),
    ],
)  # fmt: skip
def test_formats(fields: dict[str, Any], wanted: StructuredOutput | None) -> None:
    assert structured_output(fields)[1] == wanted


def test_choices_are_texts(model: Model) -> None:
    choices = ["a.b", "a|b", "(x)", "[y]", "{2}", "\\d", "a b", "a\nb", "^$", "é#&~-/", '"', "<z>", "*+?", "😀"]
    _, structured = structured_output({"guided_choice": choices})
    for choice in choices:
        assert model.admits(structured, choice), choice
    for other in ("axb", "a", "b", "x", "y", "5", "", "é", "z"):
        assert not model.admits(structured, other), other


def test_what_a_grammar_cannot_enforce_is_an_error_for_strict_tools_alone(model: Model) -> None:
    odd = {**PLACE, "dependentSchemas": {"place": {}}, "unevaluatedProperties": False}
    for strict in (False, True):
        fields = function(name="f", parameters=odd, strict=strict)
        found = constraint(fields, model.style("hermes"))
        assert found.structured is not None
        if strict:
            with pytest.raises(ValueError, match=r"dependentSchemas|unevaluatedProperties"):
                model.compiler.matcher(found.structured)
        else:
            assert model.admits(found.structured, SPELLED["hermes"][0])
