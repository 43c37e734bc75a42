"""The law of ``speculate.verifier``, for every registered policy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.speculate_verifier import (
    HARD,
    check_example,
    check_pair,
    check_precision,
    check_rows,
    check_sequences,
)

POLICIES = enrolled("speculate.verifier")


@st.composite
def pairs(draw):
    """A target and a proposal over 2 to 6 tokens, with zeros and very unlike probabilities."""
    size = draw(st.integers(2, 6))
    shares = st.lists(
        st.one_of(st.just(0.0), st.integers(1, 4), st.floats(1e-12, 1.0)), min_size=size, max_size=size
    ).filter(any)
    return tuple([share / sum(found) for share in found] for found in (draw(shares), draw(shares)))


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(pair=pairs())
def test_what_comes_out_has_the_targets_distribution(name, pair):
    check_pair(POLICIES[name], *pair)


@pytest.mark.parametrize("pair", HARD, ids=range(len(HARD)))
@pytest.mark.parametrize("name", POLICIES)
def test_hard_pairs(name, pair):
    check_pair(POLICIES[name], *pair)


@pytest.mark.parametrize("name", POLICIES)
def test_acceptance_is_that_of_the_example(name):
    check_example(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_rows_are_verified_each_on_its_own(name):
    check_rows(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_float32_is_enough(name):
    check_precision(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_sequences_have_the_targets_distribution(name):
    check_sequences(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_verifier_can_be_made_from_its_description(name):
    rebuilt(POLICIES[name])
