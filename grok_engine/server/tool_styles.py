"""How chat templates spell tool calls, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStyle:
    """One spelling of tool calls.

    begin, end: what opens a call, and what closes it. Where a list of calls is one JSON array (`listed`), they stand
    around the array. bare: the text may also start with a call that nothing opens. arguments: the key of a call's
    arguments in JSON, beside `name`. Without that key a call is not JSON, but its name, then perhaps `id_mark` and an
    id, then `arguments_mark` and the arguments. id_size: characters of an id, letters and digits, where the template
    prescribes them.

    Of one model: `marks`, those of these strings that are control tokens, with their ids, and `others`, the ids of the
    model's other control tokens. Texts show control tokens with `SamplingParams(skip_special_tokens=False)` alone.
    """

    name: str
    begin: str = ""
    end: str = ""
    listed: bool = False
    bare: bool = False
    arguments: str = "arguments"
    id_mark: str = ""
    arguments_mark: str = ""
    id_size: int | None = None
    marks: Mapping[str, int] | None = None
    others: tuple[int, ...] = ()

    def of_model(self, control: Mapping[str, int]) -> ToolStyle:
        """The style with a tokenizer's control tokens, ids by spelling."""
        own = {self.begin, self.end, self.id_mark, self.arguments_mark}
        marks = {text: token for text, token in control.items() if text in own}
        others = tuple(sorted(token for text, token in control.items() if text not in own))
        return replace(self, marks=marks, others=others)


# The names are those of vLLM's parsers. `hermes`: Hermes 2 and 3, Qwen 2.5 and 3. `mistral`: Mistral's tokenizers up to
# v7, `mistral_v11`: from v11 on. `llama3_json`: Llama 3.1 to 3.3.
STYLES = {
    style.name: style
    for style in (
        ToolStyle(name="hermes", begin="<tool_call>", end="</tool_call>"),
        ToolStyle(name="hermes_list", begin="<tool_call>", end="</tool_call>", listed=True),
        ToolStyle(name="mistral", begin="[TOOL_CALLS]", listed=True, id_size=9),
        ToolStyle(
            name="mistral_v11", begin="[TOOL_CALLS]", arguments="", id_mark="[CALL_ID]", arguments_mark="[ARGS]",
            id_size=9,
        ),
        ToolStyle(name="llama3_json", begin="<|python_tag|>", bare=True, arguments="parameters"),
    )
}  # fmt: skip

# For a template that spells no calls: one object, which is the whole answer.
PLAIN = ToolStyle(name="plain", bare=True)


def style_of(template: str, control: Mapping[str, int]) -> ToolStyle | None:
    """The spelling of tool calls in a chat template, a Jinja text, or None if it has none that is known here.

    control: the ids of the tokenizer's control tokens, by spelling (`Tokenizer.control.ids`).
    """
    text = template.replace('\\"', '"').replace("\\n", "\n")
    if "[TOOL_CALLS]" in text:
        name = "mistral_v11" if "[ARGS]" in text else "mistral"
    elif "<tool_call>" in text:
        if "<function=" in text or "<arg_key>" in text:  # calls in XML: Qwen3-Coder, GLM-4.5
            return None
        name = "hermes_list" if "<tool_call>[" in text else "hermes"
    elif '{"name": function name, "parameters":' in text:  # what Llama's templates tell the model
        name = "llama3_json"
    else:
        return None
    return STYLES[name].of_model(control)
