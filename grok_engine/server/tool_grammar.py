"""Grammars of answers that call tools, in the Lark dialect of the engine's grammar library.

An answer that must call is calls alone, in the template's spelling. One that may call is text in which nothing opens a
call, or text and then calls: what opens a call forces the rest of it, and nothing follows the calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grok_engine import StructuredOutput

from .tool_styles import ToolStyle

_ANY = r"/(.|\n)+/"
_SPACE = r"/[ \n]?/"
# As the engine writes JSON, and as templates do. A tool that is not strict may have a schema with keywords that the
# grammar cannot follow.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class Tool(NamedTuple):
    """A function that may be called. parameters: the JSON schema of its arguments, an object."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool


def calls_grammar(style: ToolStyle, tools: Sequence[Tool], *, must: bool, many: bool) -> StructuredOutput:
    """The grammar of answers that call some of these tools. must: text alone will not do. many: more than one call.

    The text is as free as without tools: the model's control tokens may stand in it.
    """
    marks = style.marks or {}

    def mark(text: str) -> str:
        return f"<[{marks[text]}]>" if text in marks else json.dumps(text)

    begin, end = (mark(text) if text else "" for text in (style.begin, style.end))
    if style.listed:
        more = f'("," {_SPACE} call)*' if many else ""
        inner = f'{_SPACE} "[" call {more} "]"'
    else:
        inner = f"{_SPACE} call" if style.arguments else "call"
    inner += f" {_SPACE} {end}" if end else ""
    further = f"({_SPACE} {begin} {inner})*" if many and not style.listed and not style.bare else ""
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        schema = {"x-guidance": {**_COMPACT, "lenient": not tool.strict}, **tool.parameters}
        arguments = f"%json {json.dumps(schema, ensure_ascii=False)}"
        if style.arguments:
            head = rf'/\{{ ?"name": ?"{re.escape(tool.name)}", ?"{style.arguments}": ?/'
            own_id = f'(/, ?"id": ?"[a-zA-Z0-9]{{{style.id_size}}}"/)?' if style.id_size else ""
            rules.append(f'call_{i}: {head} {arguments} {own_id} "}}"')
        else:
            own_id = f"({mark(style.id_mark)} /[a-zA-Z0-9]{{{style.id_size}}}/)?"
            rules.append(f"call_{i}: {json.dumps(tool.name)} {own_id} {mark(style.arguments_mark)} {arguments}")
    calls = f"{inner} {further}"
    if must:
        optional = f"{begin}?" if style.bare and style.begin in marks else ""
        start = f"{optional} call" if style.bare else f"{begin} {calls}"
    else:
        start = _with_text(style, begin, calls, rules)
    return StructuredOutput(grammar="\n".join(["%llguidance {}", f"start: {start}", *rules]))


def _with_text(style: ToolStyle, begin: str, calls: str, rules: list[str]) -> str:
    """`start` where text may come before the calls, or instead of them. Adds rules of its own."""
    opens = style.begin in (style.marks or {})
    unlike = [r'/\s*\{\s*"name"(.|\n)*/'] if style.bare else []
    if not opens and style.begin:
        unlike.append(rf"/(.|\n)*{re.escape(style.begin)}(.|\n)*/")
    rules.append("TEXT: " + " & ".join([_ANY, *(f"~{each}" for each in unlike)]))
    before = ""
    if style.others:
        rules.append(f"before: (TEXT? <[{_ranges(style.others)}]>)*")
        before = "before"
    if style.bare:
        return f"{before} TEXT? " + (f"({begin} call)? | call" if opens else "| call")
    if opens:
        return f"{before} TEXT? ({begin} {calls})?"
    rules.append(rf"head[lazy]: /(.|\n)*{re.escape(style.begin)}/")
    return f"{before} (TEXT? | head {calls})"


def _ranges(ids: Sequence[int]) -> str:
    """Sorted ids as the grammar library writes sets of tokens, 3-5,9."""
    runs: list[list[int]] = []
    for each in ids:
        if runs and each == runs[-1][1] + 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
