"""The optimal acceptance, beside a linear program over all couplings, brute force and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch

from optimal_transport import most_accepted
from penstock.core.randomness import torch_generator
from penstock.speculate.bound import MOST, optimal_acceptance
from penstock.speculate.drafting import Drafting
from penstock.testing.speculate_verifier import HARD, all_drafts, optimum, pairs

WAYS = list(Drafting)

#: Which of several equally likely tokens are greedy drafts is not said.
UNTIED = [
    (target, proposal) for target, proposal in HARD if len(set(proposal) - {0}) == len(proposal) - proposal.count(0)
]


def bounds(target, proposal, most, drafting):
    """The optimal acceptance of 1 to ``most`` drafts, from lists."""
    rows = (torch.tensor([each], dtype=torch.float64) for each in (target, proposal))
    return optimal_acceptance(*rows, most, drafting)[0].tolist()


@pytest.mark.parametrize("drafting", WAYS)
def test_the_bound_is_the_optimum_of_the_linear_program(drafting):
    for target, proposal in [*UNTIED, *pairs(15), *pairs(3, vocabulary=6)]:
        found = bounds(target, proposal, 3, drafting)
        for count in (1, 2, 3):
            assert found[count - 1] == pytest.approx(
                most_accepted(target, *all_drafts(proposal, count, drafting)), abs=1e-9
            )


@pytest.mark.parametrize("drafting", WAYS)
def test_no_set_of_tokens_gives_less_than_the_sorted_ones(drafting):
    for target, proposal in itertools.chain(UNTIED, pairs(60)):
        found = bounds(target, proposal, 4, drafting)
        assert found == pytest.approx([optimum(target, proposal, n, drafting) for n in (1, 2, 3, 4)], abs=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1e-40, 1e-200])
def test_tokens_that_are_hardly_ever_drafted_are_drafted_where_nothing_else_is_left(scale):
    proposal = [1 - 3 * scale, scale, 2 * scale, 0.0]
    target = [0.2, 0.1, 0.3, 0.4]
    found = bounds(target, proposal, 4, Drafting.DISTINCT)
    assert found == pytest.approx([optimum(target, proposal, n, Drafting.DISTINCT) for n in (1, 2, 3, 4)], abs=1e-7)
    assert found[2:] == pytest.approx([0.6, 0.6])


def test_one_draft_is_the_sum_of_the_lesser_probabilities():
    generator = torch_generator(0, "test/bound")
    target, proposal = (torch.randn(2, 20, 300, generator=generator) * 3).double().softmax(-1)
    wanted = torch.minimum(target, proposal).sum(-1)
    for drafting in WAYS:
        torch.testing.assert_close(optimal_acceptance(target, proposal, 1, drafting)[:, 0], wanted)


def test_two_independent_drafts_as_in_closed_form():
    """The minimum over all sets S of q(S) + 1 - p(S)^2, with p the proposal and q the target."""
    for target, proposal in pairs(30):
        tokens = range(len(target))
        subsets = (each for size in range(len(target) + 1) for each in itertools.combinations(tokens, size))
        wanted = min(1 + sum(target[t] for t in each) - sum(proposal[t] for t in each) ** 2 for each in subsets)
        assert bounds(target, proposal, 2, Drafting.INDEPENDENT)[1] == pytest.approx(wanted, abs=1e-12)


def test_more_drafts_are_never_worse_and_distinct_ones_are_better_than_independent_ones():
    generator = torch_generator(1, "test/bound")
    target, proposal = (torch.randn(2, 20, 200, generator=generator) * 2).double().softmax(-1)
    found = {drafting: optimal_acceptance(target, proposal, 8, drafting) for drafting in WAYS}
    for each in found.values():
        assert (each[:, 1:] >= each[:, :-1] - 1e-12).all()
        assert ((each >= 0) & (each <= 1 + 1e-12)).all()
    assert (found[Drafting.DISTINCT] >= found[Drafting.INDEPENDENT] - 1e-12).all()


def test_the_number_of_drafts_is_bounded():
    shares = torch.tensor([[0.5, 0.5]])
    for most in (0, MOST + 1):
        with pytest.raises(ValueError, match="1 to 12 drafts"):
            optimal_acceptance(shares, shares, most, Drafting.DISTINCT)
    crowd = torch.full((1, 400), 1 / 400, dtype=torch.float64)
    assert optimal_acceptance(crowd, crowd, MOST, Drafting.DISTINCT)[0].tolist() == pytest.approx([1.0] * MOST)
