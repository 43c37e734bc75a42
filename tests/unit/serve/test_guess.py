"""Which format a chat template tells of."""

from __future__ import annotations

import pytest

from penstock.serve.dialogue.guess import guess

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
    "harmony": "<|start|>assistant<|channel|>analysis<|message|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_tells_of_its_format(name):
    assert guess(TEMPLATES[name]).policy_name == name


def test_a_template_that_tells_of_none_has_the_commonest():
    assert guess("").policy_name == guess("{% for m in messages %}").policy_name == "hermes"
