"""Which format a chat template tells of."""

from __future__ import annotations

import pytest

from penstock.models import hub
from penstock.serve.dialogue.guess import doubt, guess, named
from penstock.serve.http.text import Tokens

#: What stands in the families' own templates.
TEMPLATES = {
    "hermes": '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json>}',
    "qwen3_coder": "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>\\nvalue_1\\n",
    "glm": "<tool_call>{function-name}\\n<arg_key>{arg-key-1}</arg_key>\\n<arg_value>{arg-value-1}</arg_value>",
    "llama3_json": '<|start_header_id|>ipython<|end_header_id|> {"name": "x", \'"parameters": \' + tojson',
    "pythonic": "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]",
    "mistral": '[AVAILABLE_TOOLS] [TOOL_CALLS] [{"name": ',
    "mistral_args": "{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '\\n```json\\n'",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>'",
    "seed_oss": "<seed:tool_call>\\n<function=example_function_name>\\n<parameter=example>value_1</parameter>",
    "minimax_m2": '{{- "<minimax:tool_call>" }}<invoke name="tool-name-1">\\n<parameter name="param-key-1">',
    "cohere2": "<|START_ACTION|> followed by a list of JSON-formatted tool calls ... write <|START_RESPONSE|>",
    "granite": "<|start_of_role|>system ... respond with <tool_call> followed by a JSON list of tools used.",
    "phi4_mini": "message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>'",
    "olmo3": "<functions>' + tools | tojson + '</functions>' ... '<function_calls>' + calls + '</function_calls>'",
    "glm4": "[gMASK]<sop>{%- if tools -%}<|system|>\\n# 可用工具",
    "harmony": "<|start|>assistant<|channel|>analysis<|message|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_tells_of_its_format(name):
    assert guess(TEMPLATES[name]).policy_name == name


def test_a_template_that_tells_of_none_has_the_commonest():
    assert guess("").policy_name == guess("{% for m in messages %}").policy_name == "hermes"


def test_a_form_that_is_not_known_is_told_of():
    warning = doubt("{% for tool in tools %}<weird>{{ tool }}</weird>{% endfor %}")
    assert warning is not None and "--dialogue" in warning and "minimax_m2" in warning


@pytest.mark.parametrize(("dialogue", "count"), [(None, 1), ("olmo3", 0)])
def test_whoever_opens_the_tokenizer_is_told_once_unless_the_form_is_named(caplog, dialogue, count):
    tokenizer = hub.load_tokenizer(hub.resolve("python-1m"))
    tokenizer.chat_template = "{% for tool in tools %}<weird>{{ tool }}</weird>{% endfor %}"
    Tokens(tokenizer, None if dialogue is None else named(dialogue))
    assert sum("--dialogue" in record.message for record in caplog.records) == count


@pytest.mark.parametrize(
    "template", ["", "{% for m in messages %}", *(f"{{{{ tools }}}} {each}" for each in TEMPLATES.values())]
)
def test_nothing_is_told_of_a_form_that_is_known_or_of_a_template_without_functions(template):
    assert doubt(template) is None
