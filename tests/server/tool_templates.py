"""Chat templates that spell tool calls as the models' own do, shortened to that."""

from __future__ import annotations

QWEN = """\
{%- if tools %}{{- '<|im_start|>system\\nCalls: <tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <object>}' }}\
{{- '\\n</tool_call><|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
        {{- '<tool_call>\\n{"name": "' }}{{- call.function.name }}{{- '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
HERMES = QWEN.replace(
    """{{- '<tool_call>\\n{"name": "' }}{{- call.function.name }}{{- '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}""",
    """{{- '<tool_call>\\n{ "arguments": ' }}{{- call.function.arguments | tojson }}
        {{- ', "name": "' }}{{- call.function.name }}{{- '"}\\n</tool_call>' }}""",
)
SMOLLM = """\
{%- if tools %}{{- '<|im_start|>system\\nAnswer <tool_call>[{\\"name\\": \\"a\\", \\"arguments\\": {}}]</tool_call>' }}\
{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- if message.tool_calls %}
        {{- '<tool_call>[' }}
        {%- for call in message.tool_calls %}
            {{- call.function | tojson }}{{- '' if loop.last else ', ' }}
        {%- endfor %}
        {{- ']</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
    {%- else %}
        {{- message.content or '' }}
        {%- if message.tool_calls %}
            {{- '[TOOL_CALLS] [' }}
            {%- for call in message.tool_calls %}
                {{- (call.function | tojson)[:-1] }}
                {{- ', "id": "' + call.id + '"}' }}{{- '' if loop.last else ', ' }}
            {%- endfor %}
            {{- ']' }}
        {%- endif %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_V11 = MISTRAL.replace(
    MISTRAL[MISTRAL.index("            {{- '[TOOL_CALLS] ['") : MISTRAL.index("        {%- endif %}\n        {{- eos")],
    """\
            {%- for call in message.tool_calls %}
                {{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' }}
                {{- call.function.arguments | tojson }}
            {%- endfor %}
""",
)
LLAMA = """\
{{- bos_token }}
{%- if tools %}{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name}. ' }}\
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", ' }}{{- '"parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
    {%- else %}{{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
XML = QWEN.replace('{\\"name\\"', "<function=name>").replace('{"name": "', "<function=")

# By the name of the style, and what ends a turn.
TEMPLATES = {
    "hermes": (QWEN, "<|im_end|>\n"), "hermes_list": (SMOLLM, "<|im_end|>\n"), "mistral": (MISTRAL, "</s>"),
    "mistral_v11": (MISTRAL_V11, "</s>"), "llama3_json": (LLAMA, "<|eot_id|>"),
}  # fmt: skip
