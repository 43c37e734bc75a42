"""The law of ``serve.dialogue``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.serve_dialogue import check_example, check_grammar, check_inverse, check_plain, check_words

POLICIES = enrolled("serve.dialogue")
CLAUSES = [check_example, check_inverse, check_plain, check_words, check_grammar]


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_chat_formats_holds(name, clause) -> None:
    clause(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_format_can_be_made_from_its_description(name: str) -> None:
    rebuilt(POLICIES[name])
