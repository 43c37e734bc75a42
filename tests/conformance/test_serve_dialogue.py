"""The law of ``serve.dialogue``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.core.randomness import numpy_generator
from penstock.serve.dialogue.answer import Answer
from penstock.serve.dialogue.contract import EXAMPLES
from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.serve_dialogue import (
    check_example,
    check_grammar,
    check_inverse,
    check_plain,
    check_words,
    cut,
    drawn_call,
    read,
    same,
)

POLICIES = enrolled("serve.dialogue")
CLAUSES = [check_example, check_inverse, check_plain, check_words, check_grammar]


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_chat_formats_holds(name, clause) -> None:
    clause(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_format_can_be_made_from_its_description(name: str) -> None:
    rebuilt(POLICIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_a_thousand_calls_are_read_from_random_chunks(name: str) -> None:
    dialogue, draw = POLICIES[name], numpy_generator(1, "testing/thousand-calls")
    for number in range(1000):
        function = list(EXAMPLES)[int(draw.integers(len(EXAMPLES)))]
        answer = Answer(calls=(drawn_call(draw, function, dialogue),))
        text = dialogue.write(answer)
        found = read(dialogue, cut(draw, text))
        assert same(found, answer), f"call {number} is written as {text!r} and read as {found}"
