"""Prompt look-up: what is drafted, beside a search, and that it is accepted where text repeats itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ConfigError
from penstock.policy import create
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.speculate_drafter import check_engine


def searched(text: list[int], drafter: Ngram, most: int) -> list[int]:
    """What followed the latest earlier place at which the longest run of tokens at the end of the text stands."""
    for length in range(drafter.longest, drafter.shortest - 1, -1):
        run = text[len(text) - length :]
        for end in range(len(text) - 1, length - 1, -1):
            if len(run) == length and text[end - length : end] == run:
                return text[end : end + min(most, drafter.tokens)]
    return []


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(1, 12),
)
def test_it_drafts_what_a_search_finds(text, shortest, more, tokens, most):
    drafter = Ngram(tokens=tokens, shortest=shortest, longest=shortest + more)
    assert drafter.start(text).propose(most) == searched(text, drafter, most)


def test_drafts_are_accepted_where_text_repeats_itself():
    now = check_engine(Ngram(shortest=1)).snapshot()
    assert 0 < now.accepted_tokens <= now.drafted_tokens
    assert now.steps < now.output_tokens


def test_a_range_of_lengths_is_ordered():
    with pytest.raises(ConfigError, match="shortest"):
        create("speculate.drafter", "ngram", shortest=5, longest=4)
