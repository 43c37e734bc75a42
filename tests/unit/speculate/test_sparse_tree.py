"""The plans of trees and probes are the best there are, by trying every one."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from penstock.speculate.contract import AWAITED
from penstock.speculate.sparse_tree import best_plan, evaluated, outcome, ranks_of
from penstock.speculate.tree import Tree, depths


@functools.cache
def every_tree(tall: int, probes: int, ranks: int, most: int) -> tuple[Tree, ...]:
    """All trees up to ``tall`` tokens tall, with up to so many ``probes`` and children (``ranks``) behind a token, of
    up to ``most`` rows."""

    def grown(parents: tuple[int, ...], depth: dict[int, int]):
        yield parents
        if len(parents) == most:
            return
        # Generation by generation: the next node's parent is the last one's or a later one.
        for parent in range(parents[-1] if parents else -1, len(parents)):
            if depth[parent] < tall and parents.count(parent) < ranks:
                yield from grown((*parents, parent), {**depth, len(parents): depth[parent] + 1})

    return tuple(
        Tree([AWAITED] * len(parents), list(parents), list(counts))
        for parents in grown((), {-1: 0})
        for counts in itertools.product(range(probes + 1), repeat=len(parents) + 1)
        if len(parents) + sum(counts) <= most
    )


ACCEPTANCE = {
    "sure": [[0.8, 0.1], [0.6, 0.2]],
    "unsure": [[0.3, 0.25], [0.2, 0.15]],
    "hopeless": [[0.02, 0.01], [0.01, 0.0]],
    "later better": [[0.4, 0.1], [0.9, 0.05]],
}


@pytest.mark.parametrize("each", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("accepted", ACCEPTANCE)
def test_no_plan_brings_more_tokens_a_unit_of_cost(accepted, each):
    acceptance, most = np.array(ACCEPTANCE[accepted]), 6
    costs = 1 + each * np.arange(most + 1)
    found = best_plan(acceptance, costs)
    everywhere = [every_tree(state, 2, 2, most) for state in range(3)]
    # Of a plan, only its trees' tokens, costs and transitions matter: those are worked out once for each tree.
    rates = stationary_rates(
        [[(*outcome(tree, acceptance, 3), costs[tree.rows]) for tree in own] for own in everywhere]
    )
    assert len(rates) > 10_000
    assert found.rate == pytest.approx(rates.max(), rel=1e-5)
    assert evaluated(found.trees, acceptance, costs)[0].rate == pytest.approx(found.rate, rel=1e-12)


def stationary_rates(outcomes) -> np.ndarray:
    """The rate of every plan that takes one of the ``outcomes`` of each of three states: by the closed form of the
    stationary distribution, whose probabilities are the cofactors of I - P."""
    tokens, moves, costs = ([np.array([each[part] for each in own]) for own in outcomes] for part in range(3))
    first, second, third = (
        (moves[state] * (1 - 1e-6) + 1e-6 * np.eye(3)[0]).reshape([-1 if n == state else 1 for n in range(3)] + [3])
        for state in range(3)
    )
    shares = [
        (1 - second[..., 1]) * (1 - third[..., 2]) - second[..., 2] * third[..., 1],
        first[..., 1] * (1 - third[..., 2]) + first[..., 2] * third[..., 1],
        first[..., 2] * (1 - second[..., 1]) + first[..., 1] * second[..., 2],
    ]

    def summed(values):
        spread = [np.expand_dims(own, [n for n in range(3) if n != state]) for state, own in enumerate(values)]
        return sum(share * own for share, own in zip(shares, spread, strict=True))

    return (summed(tokens) / summed(costs)).ravel()


def test_of_a_tree_the_outcome_is_that_of_every_way():
    tree = Tree([AWAITED] * 4, [-1, -1, 0, 0], [2, 1, 0, 3, 1])
    acceptance = np.array([[0.5, 0.25], [0.6, 0.2], [0.0, 0.0]])
    tokens, moves = outcome(tree, acceptance, 4)
    # The newest token's own and, for each node, the product of the chances on its way.
    assert tokens == pytest.approx(1 + 0.5 + 0.25 + 0.5 * 0.6 + 0.5 * 0.2)
    # The newest token is the last accepted one with 1/4, its second child with 1/4; of the first one's 1/2, a fifth is
    # its own, 0.6 and 0.2 its children's.
    assert moves == pytest.approx([0.25, 0.1 + 0.1, 0.25, 0.3])
    assert ranks_of(tree.parents) == [0, 1, 0, 1]


def test_a_plan_is_no_taller_than_what_is_guessed_and_no_larger_than_what_it_may_be():
    acceptance = 0.6 * 0.8 ** np.arange(4)[:, None] * 0.4 ** np.arange(5)
    plan = best_plan(acceptance, np.ones(41))
    assert len(plan.trees) == 5 and plan.shares.sum() == pytest.approx(1)
    for state, tree in enumerate(plan.trees):
        assert max(depths(tree.parents), default=0) <= state
        assert tree.rows <= 40 and len(tree.probes) == 1 + len(tree.parents)
        assert tree.parents == sorted(tree.parents)
        assert max(ranks_of(tree.parents), default=0) < 5
    assert plan.rate > 2


def test_where_rows_cost_more_than_they_bring_there_are_none():
    plan = best_plan(np.array([[0.3, 0.1]]), 1.0 + np.arange(9))
    assert plan.trees[0].rows == 0 and plan.rate == pytest.approx(1)
