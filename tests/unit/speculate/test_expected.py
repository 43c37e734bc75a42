"""Tokens a step, beside sums over all that may happen."""

from __future__ import annotations

import itertools
import random

import pytest

from penstock.speculate.expected import chain_tokens, tree_tokens


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
    assert tree_tokens(range(-1, drafts - 1), [acceptance] * drafts) == pytest.approx(wanted, abs=1e-12)


def test_a_tree_beside_a_walk_down_all_its_branches():
    rng = random.Random(0)
    for _ in range(20):
        parents = [rng.randrange(-1, node) for node in range(9)]
        acceptance = [rng.random() / 9 for _ in parents]

        def below(parent: int, parents=parents, acceptance=acceptance) -> float:
            return 1 + sum(acceptance[node] * below(node) for node in range(9) if parents[node] == parent)

        assert tree_tokens(parents, acceptance) == pytest.approx(below(-1), abs=1e-12)


@pytest.mark.parametrize(
    ("parents", "acceptance", "fault"),
    [([0], [0.5], "does not stand before"), ([-1, -1], [0.7, 0.7], "more than 1"), ([-2], [0.5], "does not stand")],
)
def test_what_is_no_tree_is_refused(parents, acceptance, fault):
    with pytest.raises(ValueError, match=fault):
        tree_tokens(parents, acceptance)
