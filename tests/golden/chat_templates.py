"""Writes chat_templates.json: what transformers renders for templates in the manner of the common model families.

Written with transformers 5.19.0 and jinja2 3.1.6: python chat_templates.py > chat_templates.json
"""

import json

from transformers.utils.chat_template_utils import _compile_jinja_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Says "rain" or <sun> & more: 日本',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "It's a city"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14.5},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "noop", "parameters": None}},
]

CALL = {"type": "function", "id": "call12345", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}}

CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hello  there\n"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    "thoughts": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\none and one\n</think>\n\n2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "\ntwo and two\n"},
        {"role": "assistant", "content": "<think>\n\ndone\n</think>\n\n5?"},
    ],
    "turns": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": " 2 "},
        {"role": "user", "content": "日本 <|x|> 'q' \"d\""},
    ],
    "order": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "calls": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "{\"sky\": \"clear\"}"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "image"}, {"type": "text", "text": "Two."}]}],
    "empty": [],
}

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You help.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant, not ' ~ message.role) }}
    {%- endif %}
    {%- if loop.index0 == 0 and system != false %}
        {%- set content = '<<SYS>>\\n' + system.strip() + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' '  + content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""

LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}
{% if tools is not none %}
    {{- "You have these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}<|eot_id|>
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in messages | rejectattr("role", "equalto", "system") %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" and message.tool_calls is defined and message.tool_calls is not none %}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- "[TOOL_CALLS] [" if loop.first }}{{ out[:-1] }}
            {%- if tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " + '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Q.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n{}'.format(ns.last_query_index) }}
    {%- endif %}
{%- endif %}
"""

# Thoughts stay in the turn that is being answered and are taken out of the turns before it.
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_question=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' and message.content is string and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last_question = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_question and (loop.last or (not loop.last and thoughts)) %}
            {{- '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

# What the families above leave out: Python's way of writing values, generation blocks, loop controls, macros, parts.
EXTENSIONS = """{%- macro part(p) -%}
    {%- if p.type == 'text' -%}{{ p.text }}{%- else -%}[{{ p.type | upper }}]{%- endif -%}
{%- endmacro -%}
{{ tools }} {{ none }} {{ true }} {{ 1.0 }} {{ 1e-7 * 1 }} {{ [1, 'a', {'b': false}] }} {{ {'x': none} | string }}
{{ messages | length }}{{ documents is none }}
  {% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% generation %}
    {{ message.role.title() }}: {{ message.content if message.content is string else '' }}
    {%- endgeneration -%}
    {% if message.content is iterable and message.content is not string %}
        {%- for p in message.content %}{{ part(p) }}{% endfor %}
    {% endif %}
    {% if loop.index > 1 %}{% break %}{% endif %}
  {% endfor %}
{{ {'b': 1, 'a': [1.5, 'é<']} | tojson(ensure_ascii=true, sort_keys=true) }} {{ [1, {'k': 2}] | tojson(separators=(',', ':')) }}
{%- set split = 'a,b,,c'.split(',') %} {{ split | join('|') }} {{ '  x '.lstrip() }}| {{ 'aXbX'.replace('X', '-') }} {{ messages | map(attribute='role') | unique | join(', ') }}
{# a comment #}
{{- eos_token }}
"""

TEMPLATES = {
    "smollm2": SMOLLM2,
    "llama-2": LLAMA2,
    "llama-3.1": LLAMA31,
    "mistral": MISTRAL,
    "qwen-2.5": QWEN25,
    "qwen-3": QWEN3,
    "extensions": EXTENSIONS,
}

VARIANTS = [
    {"tools": False, "add_generation_prompt": True, "extra": {}},
    {"tools": True, "add_generation_prompt": True, "extra": {"date_string": "1 May 2025", "enable_thinking": False}},
    {"tools": False, "add_generation_prompt": False, "extra": {"bos_token": "<BOS>"}},
]


def case(template, messages, variant):
    tools = TOOLS if variant["tools"] else None
    variables = {**TOKENS, **variant["extra"]}
    try:
        text = _compile_jinja_template(template).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=variant["add_generation_prompt"],
            **variables,
        )
        return {"text": text}
    except Exception as error:
        # `raise_exception` raises a plain TemplateError; everything else is our own kind of failure.
        raised = type(error).__name__ == "TemplateError"
        return {"raised": str(error)} if raised else {"failed": type(error).__name__}


def main():
    rendered = []
    for name, template in TEMPLATES.items():
        for conversation, messages in CONVERSATIONS.items():
            for index, variant in enumerate(VARIANTS):
                result = case(template, messages, variant)
                rendered.append({"template": name, "conversation": conversation, "variant": index, **result})
    document = {
        "tokens": TOKENS,
        "tools": TOOLS,
        "templates": TEMPLATES,
        "conversations": CONVERSATIONS,
        "variants": VARIANTS,
        "rendered": rendered,
    }
    print(json.dumps(document, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
