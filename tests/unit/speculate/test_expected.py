"""Tokens a step, beside sums over all that may happen."""

from __future__ import annotations

import itertools

import pytest

from penstock.speculate.expected import chain_tokens


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_a_chain_beside_all_ways_in_which_it_may_end(acceptance, drafts):
    wanted = 0.0
    for accepted in itertools.product([False, True], repeat=drafts):
        chance = 1.0
        for each in accepted:
            chance *= acceptance if each else 1 - acceptance
        wanted += chance * (1 + sum(1 for _ in itertools.takewhile(bool, accepted)))
    assert chain_tokens(acceptance, drafts) == pytest.approx(wanted, abs=1e-12)
