"""Turns of models whose files carry no template: Grok-2's, and Mistral's by the version of their tokenizers.

Each is a chat template. Text between two control tokens is encoded on its own, as Mistral's own library does it, so no
spaces stand around the markers: SentencePiece begins a text with one.
"""

from __future__ import annotations

from collections.abc import Collection

GROK_2_ENDS = ("<|separator|>", "<|eos|>")
GROK_2 = """\
{%- for message in messages %}
{%- if message.role == 'user' %}{{- 'Human: ' + message.content.strip() + '<|separator|>\\n\\n' }}
{%- elif message.role == 'system' %}{{- 'System: ' + message.content.strip() + '<|separator|>\\n\\n' }}
{%- elif message.role == 'assistant' %}{{- 'Assistant: ' + message.content + '<|separator|>\\n\\n' }}
{%- else %}{{- raise_exception('role ' + message.role + ' is not one of system, user, assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""

# What the versions share: system turns are collected, neighbours of one role are joined.
_MISTRAL = """\
{%- set ns = namespace(system=[], turns=[], first=-1, last=-1) %}
{%- for message in messages %}
{%- if message.role not in ROLES %}
{{- raise_exception('role ' + message.role + ' is not one of ' + ROLES | join(', ')) }}
{%- elif message.role == 'system' and SYSTEM_APART is false %}{%- set ns.system = ns.system + [message.content] %}
{%- elif ns.turns and message.role in ['user', 'assistant'] and message.role == ns.turns[-1].role
    and not message.tool_calls and not ns.turns[-1].tool_calls %}
{%- set joined = dict(role=message.role, content=ns.turns[-1].content + '\\n\\n' + message.content) %}
{%- set ns.turns = ns.turns[:-1] + [joined] %}
{%- else %}{%- set ns.turns = ns.turns + [message] %}
{%- endif %}
{%- endfor %}
{%- for message in ns.turns %}
{%- if message.role == 'user' %}
{%- if ns.first < 0 %}{%- set ns.first = loop.index0 %}{%- endif %}
{%- set ns.last = loop.index0 %}
{%- endif %}
{%- endfor %}
{%- set system = (ns.system + ['']) | join('\\n\\n') %}
{{- bos_token }}
{%- for message in ns.turns %}
"""

_V1 = (
    "{%- set ROLES = ['system', 'user', 'assistant'] %}{%- set SYSTEM_APART = false %}\n"
    + _MISTRAL
    + """\
{%- if message.role == 'user' %}
{{- '[INST] ' + (system if loop.index0 == ns.first else '') + message.content + ' [/INST]' }}
{%- else %}{{- ' ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}"""
)

_CALLS = """\
{%- set ns.calls = [] %}
{%- for call in message.tool_calls or [] %}
{%- set one = dict(name=call.function.name, arguments=call.function.arguments) %}
{%- if call.id %}{%- set one = dict(one, id=call.id) %}{%- endif %}
{%- set ns.calls = ns.calls + [one] %}
{%- endfor %}
{{- (message.content or '').rstrip(' ') }}
{%- if ns.calls %}{{- '[TOOL_CALLS]' + ns.calls | tojson }}{%- endif %}
{{- eos_token }}
"""

_USER = """\
{%- elif message.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST]' + (system if loop.index0 == ns.last else '') + message.content + '[/INST]' }}
{%- else %}
"""

_V3 = (
    "{%- set ROLES = ['system', 'user', 'assistant', 'tool'] %}{%- set SYSTEM_APART = false %}\n"
    + _MISTRAL
    + """\
{%- if message.role == 'tool' %}
{{- '[TOOL_RESULTS]' + dict(content=message.parsed, call_id=message.tool_call_id) | tojson + '[/TOOL_RESULTS]' }}
"""
    + _USER
    + _CALLS
    + "{%- endif %}\n{%- endfor %}"
)

_V7 = (
    "{%- set ROLES = ['system', 'user', 'assistant', 'tool'] %}{%- set SYSTEM_APART = true %}\n"
    + _MISTRAL
    + """\
{%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS]' + message.tool_call_id + '[TOOL_CONTENT]' + message.content + '[/TOOL_RESULTS]' }}
"""
    + _USER
    + _CALLS
    + "{%- endif %}\n{%- endfor %}"
)

BUILT_IN = {"grok-2": GROK_2, "mistral-v1": _V1, "mistral-v3": _V3, "mistral-v7": _V7}


def built_in(control: Collection[str], architecture: str) -> str | None:
    """The name of the template that a model's control tokens and architecture (`MixtralForCausalLM`) ask for."""
    if {*GROK_2_ENDS} <= {*control}:
        return "grok-2"
    if {"[INST]", "[/INST]"} <= {*control}:
        return "mistral-v7" if "[SYSTEM_PROMPT]" in control else "mistral-v3"
    return "mistral-v1" if architecture in ("MistralForCausalLM", "MixtralForCausalLM") else None
