"""What a request's text must match: OpenAI's `response_format` and vLLM's fields, as the engine takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from grok_engine import StructuredOutput

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


def structured_output(fields: Mapping[str, Any]) -> tuple[str, StructuredOutput | None]:
    """The field that says what the text must match, and what that is; an empty name where none does.

    fields: of a request, of which `response_format` and those of `GUIDED` count; None stands for an absent one.
    ValueError with the value for a field that is wrong, and with the names for two of them. The schemas and grammars
    themselves are checked by the engine, when the request is added.
    """
    given = {name: fields[name] for name in ("response_format", *GUIDED) if fields.get(name) is not None}
    if given.get("response_format") == {"type": "text"}:
        del given["response_format"]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given: expected one of them")
    if not given:
        return "", None
    ((name, value),) = given.items()
    if name == "response_format":
        return name, _response_format(value)
    if name != "structured_outputs":
        return name, _guided(name.removeprefix("guided_"), value, name)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r:.200} is not an object")
    found = {key: item for key, item in value.items() if item is not None}
    if len(found) != 1 or (key := next(iter(found))) not in _KINDS:
        raise ValueError(f"{name} has {', '.join(map(str, found)) or 'nothing'}: expected one of {', '.join(_KINDS)}")
    return name, _guided(key, found[key], f"{name}.{key}")


def _response_format(value: Any) -> StructuredOutput:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_object":
        return StructuredOutput(json_schema={"type": "object"})
    if kind != "json_schema":
        raise ValueError(
            f"response_format={value!r:.200}: expected an object with a type of text, json_object or json_schema"
        )
    found = value.get("json_schema")
    if not isinstance(found, Mapping):
        raise ValueError(f"response_format.json_schema={found!r:.200} is not an object with name and schema")
    name, schema, strict = found.get("name"), found.get("schema"), found.get("strict")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"response_format.json_schema.name={name!r:.200}: expected 1 to 64 of A-Z a-z 0-9 _ -")
    if not isinstance(schema, Mapping):
        raise ValueError(f"response_format.json_schema.schema={schema!r:.200} is not an object")
    if not isinstance(strict, (bool, type(None))):
        raise ValueError(f"response_format.json_schema.strict={strict!r:.200}: expected true or false")
    return StructuredOutput(json_schema=schema)


def _guided(kind: str, value: Any, name: str) -> StructuredOutput:
    """One of vLLM's kinds. name: of the field, for messages."""
    if kind == "json_object" and value is True:
        return StructuredOutput(json_schema={"type": "object"})
    if kind == "json" and isinstance(value, (str, Mapping, bool)):
        return StructuredOutput(json_schema=value)
    if kind == "regex" and isinstance(value, str):
        return StructuredOutput(regex=value)
    if kind == "grammar" and isinstance(value, str):
        return StructuredOutput(grammar=value)
    if kind == "choice" and isinstance(value, list) and value and all(isinstance(choice, str) for choice in value):
        return StructuredOutput(regex="|".join(map(_literal, value)))
    wanted = {
        "json": "a schema, as an object or its text", "json_object": "true", "choice": "a list of at least one text",
    }  # fmt: skip
    raise ValueError(f"{name}={value!r:.200} is not {wanted.get(kind, 'text')}")


def _literal(text: str) -> str:
    """A regex of a text. Unlike `re.escape`, it escapes nothing that the grammar library takes for something else."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~\-/]", r"\\\g<0>", text)
