"""Trees that follow what is accepted and what steps cost."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.speculate.contract import AWAITED
from penstock.speculate.shaping import STEPS, SparseTrees, fitting
from penstock.speculate.tree import Tree, depths


def alike(rows: np.ndarray) -> np.ndarray:
    return np.ones(rows.shape)


def test_what_is_accepted_is_learned_by_depth_and_rank():
    shaper = SparseTrees(ahead=2, ranks=3, rows=12)
    before = shaper.acceptance
    assert (np.diff(before, axis=1) < 0).all() and (np.diff(before[:, 0]) < 0).all()
    # Two behind the newest token; of the second, which is accepted, two children, of which none is.
    tree = Tree([AWAITED] * 4, [-1, -1, 0, 1], [1, 1, 1, 0, 0])
    for _ in range(400):
        shaper.learn(tree, [1])
    after = shaper.acceptance
    assert after[0, 0] < 0.05 and after[0, 1] > 0.9
    assert after[1, 0] < 0.05  # the one behind the second; the one behind the first was not tried
    assert after[0, 2] < before[0, 2] and (after.sum(1) <= 1).all()
    assert after[1, 2] / after[1, 1] == pytest.approx(before[1, 2] / before[1, 1])  # nothing is known of these


def test_guesses_beside_a_likelier_one_that_was_accepted_were_not_tried():
    shaper = SparseTrees(ahead=1, ranks=3, rows=12)
    before = shaper.acceptance
    for _ in range(400):
        shaper.learn(Tree([AWAITED] * 3, [-1, -1, -1], [0] * 4), [0])
    after = shaper.acceptance
    assert after[0, 0] > 0.9
    # Of what is left where the first is wrong, they have the shares that they had.
    left = [rates[0, 1:] / (1 - rates[0, 0]) for rates in (before, after)]
    np.testing.assert_allclose(left[0], left[1], rtol=1e-9)


def test_trees_grow_to_what_is_accepted_and_shrink_where_rows_cost():
    shaper = SparseTrees(ahead=3, ranks=4, rows=20)
    shaper.plan(3, alike)
    wide = shaper.shape(3)
    for _ in range(300):
        shaper.learn(Tree([AWAITED] * 3, [-1, 0, 1], [3] * 4), [0, 1, 2])
    for _ in range(STEPS):
        shaper.plan(3, alike)
    sure = shaper.shape(3)
    assert max(depths(sure.parents)) == 3 and sure.probes[3] == 3
    costly = SparseTrees(ahead=3, ranks=4, rows=20)
    costly.plan(3, lambda rows: rows.astype(float))
    assert costly.shape(0).rows == 0 < wide.rows
    shaper.plan(1, alike)
    assert max(depths(shaper.shape(3).parents)) == max(shaper.shape(3).probes) == 1


def test_a_tree_that_does_not_fit_loses_its_last_nodes_and_what_is_too_far():
    tree = Tree([AWAITED] * 4, [-1, -1, 0, 2], [2, 2, 1, 2, 1])
    assert fitting(tree, 9, 99) == tree
    assert fitting(tree, 2, 99) == Tree([AWAITED] * 3, [-1, -1, 0], [2, 1, 1, 0])
    assert fitting(tree, 9, 7) == Tree([AWAITED] * 2, [-1, -1], [2, 2, 1])
    assert fitting(tree, 9, 1) == Tree([], [], [1])
    assert fitting(tree, 0, 99) == Tree([], [], [0])
