"""What is said of functions whose calls no grammar can hold to their schemas."""

from __future__ import annotations

import pytest

from penstock.core.errors import UsageError
from penstock.serve.dialogue.answer import Function
from penstock.serve.dialogue.contract import EXAMPLES
from penstock.serve.dialogue.lark import check_functions

FAULTS = {
    "look-around": {"type": "string", "pattern": "(?=x)y"},
    "Unimplemented": {"not": {"type": "string"}},
    "nothing": {"$ref": "#/$defs/nothing"},
    "unsatisfiable": {"type": "integer", "minimum": 5, "maximum": 2},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_the_function_and_the_reason_are_named_in_one_line(reason):
    bad = Function("late", parameters={"type": "object", "properties": {"a": FAULTS[reason]}, "required": ["a"]})
    with pytest.raises(UsageError) as caught:
        check_functions({**EXAMPLES, "late": bad})
    said = str(caught.value)
    assert "'late'" in said and reason in said and "\n" not in said.partition("Change the schema")[0].strip()
    assert "start:" not in said and "%json" not in said


def test_functions_that_a_grammar_can_hold_pass():
    check_functions(EXAMPLES)
