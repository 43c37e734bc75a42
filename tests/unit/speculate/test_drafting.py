"""Drafts are drawn as they are enumerated."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from penstock.speculate.drafting import Drafting, draw_drafts
from penstock.testing.speculate_verifier import all_drafts

#: Half, a third and a sixth; what is left of them without each other divides the grid below.
SHARES = [1 / 2, 0.0, 1 / 6, 1 / 3]
POINTS = 60


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("drafting", list(Drafting))
def test_drafts_have_the_probabilities_that_are_enumerated(drafting, count):
    """Over all numbers of a grid that hits every probability exactly."""
    grid = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    uniform = torch.cartesian_prod(*[grid] * count).view(-1, count)
    proposal = torch.tensor([SHARES], dtype=torch.float64).expand(len(uniform), -1)
    found = Counter(map(tuple, draw_drafts(proposal, count, drafting, uniform).tolist()))
    drafts, weights = all_drafts(SHARES, count, drafting)
    assert found.keys() == set(drafts)
    for drafted, weight in zip(drafts, weights, strict=True):
        assert found[drafted] / len(uniform) == pytest.approx(weight, abs=1e-9)


@pytest.mark.parametrize(
    ("drafting", "wanted"),
    [(Drafting.INDEPENDENT, [2, 2, 2, 2]), (Drafting.DISTINCT, [2, 0, -1, -1]), (Drafting.GREEDY, [0, 2, -1, -1])],
)
def test_a_proposal_of_fewer_tokens_drafts_fewer(drafting, wanted):
    proposal = torch.tensor([[0.75, 0.0, 0.25]])
    uniform = torch.full((1, 4), 0.9, dtype=torch.float64)
    assert draw_drafts(proposal, 4, drafting, uniform).tolist() == [wanted]


def test_rows_are_drawn_each_on_its_own():
    proposal = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [0.1, 0.6, 0.3]])
    uniform = torch.tensor(list(itertools.product([0.1, 0.6, 0.95], repeat=2))[:3], dtype=torch.float64)
    for drafting in Drafting:
        together = draw_drafts(proposal, 2, drafting, uniform)
        alone = [draw_drafts(proposal[row : row + 1], 2, drafting, uniform[row : row + 1])[0] for row in range(3)]
        assert torch.equal(together, torch.stack(alone))
