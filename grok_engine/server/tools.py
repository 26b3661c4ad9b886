"""What a chat request's tools and formats ask of the model's text, and how calls are read from it. Knows no HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grok_engine import StructuredOutput

from .structured import structured_output
from .tool_grammar import Tool, calls_grammar
from .tool_styles import PLAIN, STYLES, ToolStyle

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """structured, skip_special_tokens: for `SamplingParams`. field: of the request, that `structured` comes from.
    style: of the calls to look for in each answer's text, by a `CallParser(style)` of its own; None where all of the
    text is content."""

    structured: StructuredOutput | None = None
    field: str = ""
    skip_special_tokens: bool = True
    style: ToolStyle | None = None


def constraint(fields: Mapping[str, Any], style: ToolStyle | None) -> Constraint:
    """What the fields of a chat request ask for: `tools`, `tool_choice`, `parallel_tool_calls`, and those that
    `structured_output` reads. None stands for an absent field. style: of the model's template, from `style_of`.

    - "none": the text is content.
    - "auto", the default where there are tools: the model writes text, and what opens a call forces a call of one of
      the tools. A template without a known spelling of calls is refused, since no call could be told from text.
    - "required", or a function by its name: the text is calls alone. A template that spells no calls does not tell the
      model of its tools either; as vLLM does, it gets one call in plain JSON, whose arguments fit, and the messages
      have to say what they should be.

    Arguments follow the schema of `parameters`. What the grammar cannot enforce of it is an error for a tool with
    `strict`, and ignored (logged) for others. ValueError, with the value, for fields that are wrong or exclude each
    other.
    """
    tools = read_tools(fields.get("tools"))
    choice = _choice(fields.get("tool_choice"), tools)
    many = fields.get("parallel_tool_calls")
    if not isinstance(many, (bool, type(None))):
        raise ValueError(f"parallel_tool_calls={many!r:.200}: expected true or false")
    name, structured = structured_output(fields)
    if choice == "none":
        return Constraint(structured=structured, field=name)
    if structured is not None:
        raise ValueError(f"{name} and tools are both given: expected one of them, or tool_choice='none'")
    if choice == "auto" and style is None:
        raise ValueError(
            f"tools with tool_choice='auto' need a chat template whose spelling of calls is known "
            f"({', '.join(STYLES)}): expected tool_choice='required', 'none' or a function"
        )
    style = style or PLAIN
    if isinstance(choice, Tool):
        tools, many = [choice], False
    return Constraint(
        structured=calls_grammar(style, tools, must=choice != "auto", many=many is not False),
        field="tools",
        skip_special_tokens=not style.marks,
        style=style,
    )


def explain_calls(message: str) -> str:
    """The engine's message about a grammar of `calls_grammar`, as one about the tool whose parameters are at fault."""
    found = re.match(r"structured\.grammar=[^…]*…:? (?:at (\d+)\(\d+\): )?(.*)", message)
    if found is None:
        return message
    line, reason = found.groups()
    # The message quotes the grammar from a line or two before the faulty one, and is cut short.
    quoted = re.search(r"\n *(\d+) \| (start|call|call_(\d+)):", message) if line else None
    if quoted is None:
        return f"tools: {reason}"
    index = {"start": -2, "call": -1}.get(quoted[2], int(quoted[3] or 0)) + int(line) - int(quoted[1])
    return f"tools[{index}].function.parameters: {reason}" if index >= 0 else f"tools: {reason}"


def read_tools(tools: Any) -> list[Tool]:
    """The functions of a request's `tools`. ValueError with the index and the value of one that is wrong."""
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ValueError(f"tools={tools!r:.200} is not a list")
    found: dict[str, Tool] = {}
    for index, value in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(value, Mapping) or value.get("type") != "function":
            raise ValueError(f"{where}={value!r:.200}: expected an object of type function")
        tool = _tool(value.get("function"), f"{where}.function")
        if tool.name in found:
            raise ValueError(f"{where}.function.name={tool.name!r} is there twice: expected a name of its own")
        found[tool.name] = tool
    return list(found.values())


def _tool(function: Any, where: str) -> Tool:
    if not isinstance(function, Mapping):
        raise ValueError(f"{where}={function!r:.200} is not an object with name and parameters")
    name, strict = function.get("name"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}.name={name!r:.200}: expected 1 to 64 of A-Z a-z 0-9 _ . -")
    if not isinstance(strict, (bool, type(None))):
        raise ValueError(f"{where}.strict={strict!r:.200}: expected true or false")
    if (schema := function.get("parameters")) is None:
        return Tool(name, _NO_PARAMETERS, bool(strict))
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where}.parameters={schema!r:.200} is not a JSON schema: expected an object")
    if (kind := schema.get("type", "object")) != "object":
        raise ValueError(f"{where}.parameters.type={kind!r:.200}: expected 'object', since arguments have names")
    for key, kind, wanted in (("properties", dict, "an object"), ("required", list, "a list")):
        if not isinstance(value := schema.get(key, kind()), kind):
            raise ValueError(f"{where}.parameters.{key}={value!r:.200} is not {wanted}")
    return Tool(name, {**schema, "type": "object"}, bool(strict))


def _choice(choice: Any, tools: Sequence[Tool]) -> str | Tool:
    """ "none", "auto", "required", or the function that has to be called."""
    if choice is None:
        return "auto" if tools else "none"
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        for tool in tools:
            if tool.name == name:
                return tool
        named = ", ".join(tool.name for tool in tools) or "none"
        raise ValueError(f"tool_choice.function.name={name!r:.200} is not one of the tools: {named}")
    if choice not in ("none", "auto", "required"):
        raise ValueError(f"tool_choice={choice!r:.200}: expected none, auto, required or a function")
    if not tools and choice != "none":
        raise ValueError(f"tool_choice={choice!r} needs tools: expected at least one")
    return str(choice)
