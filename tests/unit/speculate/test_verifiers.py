"""What single verifiers claim beyond the law, beside formulas and the optimum; and vocabularies of a real size."""

from __future__ import annotations

import math

import pytest
import torch

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.speculate.bound import optimal_acceptance
from penstock.speculate.drafting import Drafting, draw_drafts
from penstock.speculate.quadrature import half_line
from penstock.speculate.verifiers.accept_residual import AcceptResidual
from penstock.speculate.verifiers.importance import Importance, gains, majorant
from penstock.speculate.verifiers.importance_lp import ImportanceByProgram
from penstock.speculate.verifiers.k_seq import attempts, least_factor
from penstock.testing.enrolled import enrolled
from penstock.testing.speculate_verifier import HARD, check_pair, pairs

POLICIES = enrolled("speculate.verifier")


def random_rows(rows: int, vocabulary: int, number: int = 0, dtype: torch.dtype = torch.float64):
    """Targets and proposals that have something in common, as of two models of the same text."""
    generator = torch_generator(number, "test/verifiers")
    both, one, other = torch.randn(3, rows, vocabulary, generator=generator, dtype=torch.float64)
    return tuple((3 * both + each).softmax(-1).to(dtype) for each in (one, other))


def hits(chances, drafted):
    """The probability of each row that what comes out was drafted."""
    marked = torch.zeros_like(chances).scatter_add(-1, drafted.clamp(min=0), (drafted >= 0).to(chances.dtype))
    return (chances * (marked > 0)).sum(-1)


def test_one_draft_is_all_that_accept_residual_verifies():
    shares = torch.tensor([[0.5, 0.5]])
    with pytest.raises(UsageError, match="one draft of a place, and there are 2"):
        AcceptResidual().chances(shares, shares, torch.tensor([[0, 1]]))


def test_the_factor_is_the_least_that_leaves_every_token_its_probability():
    target, proposal = random_rows(20, 50)
    counts = torch.arange(20).unsqueeze(-1) % 8 + 1
    factor = least_factor(target, proposal, counts)

    def too_much(factor):
        once = torch.minimum(proposal, target / factor)
        return (once * attempts(once.sum(-1, keepdim=True), counts) - target).amax(-1)

    assert (too_much(factor) <= 1e-15).all()
    assert (too_much(factor - 1e-6)[counts[:, 0] > 1] > 1e-12).all()
    assert factor[counts == 1].eq(1).all()


def test_attempts_are_the_sum_of_the_chances_that_none_before_passed():
    beta = torch.tensor([[0.0], [1e-9], [0.3], [1.0]], dtype=torch.float64)
    for count in (1, 2, 7):
        wanted = sum((1 - beta) ** number for number in range(count))
        torch.testing.assert_close(attempts(beta, torch.full((4, 1), count)), wanted, rtol=1e-12, atol=0)


def test_importance_comes_near_the_optimum_in_many_rounds():
    for target, proposal in [*HARD[:8], *pairs(6)]:
        check_pair(Patient(rounds=100), target, proposal)


class Patient(Importance):
    """With a promise that many rounds keep."""

    @property
    def guarantee(self) -> float:
        return 0.999


class Best(ImportanceByProgram):
    """With the promise that no more can be accepted."""

    @property
    def guarantee(self) -> float:
        return 1.0


def test_the_program_finds_the_optimum():
    for target, proposal in [*HARD, *pairs(8)]:
        check_pair(Best(), target, proposal)


def cut_rows(tokens: int, vocabulary: int):
    """A target and a proposal over some ``tokens`` of a larger vocabulary each, most of them the same."""
    target, proposal = random_rows(1, vocabulary, 3)
    for each, shift in ((target, 0.0), (proposal, 0.5)):
        both = random_rows(1, vocabulary, 4)[0] + shift * each
        each[both < both.topk(tokens).values[:, -1:]] = 0
        each /= each.sum()
    return target, proposal


def test_of_cut_vocabularies_the_acceptance_of_two_drafts_is_the_least_over_sets():
    """Of q(S) + 1 - p(S)^2, for the target q and the proposal p, over all sets S of tokens."""
    target, proposal = cut_rows(12, 300)
    here = (proposal[0] > 0).nonzero().flatten()
    assert 12 == len(here) > len((target[0][here] > 0).nonzero()) > 4
    drafted = torch.cartesian_prod(here, here)
    found = ImportanceByProgram().chances(target.expand(144, -1), proposal.expand(144, -1), drafted)
    weights = proposal[0][drafted].prod(-1)
    torch.testing.assert_close((weights.unsqueeze(-1) * found).sum(0), target[0], rtol=0, atol=1e-13)
    sets = (torch.arange(1 << 12).unsqueeze(-1) >> torch.arange(12) & 1).double()
    wanted = (1 + sets @ target[0][here] - (sets @ proposal[0][here]) ** 2).min()
    assert (weights * hits(found, drafted)).sum().item() == pytest.approx(wanted.item(), abs=1e-10)


def test_where_there_are_more_tokens_than_the_program_is_for_weights_choose():
    target, proposal = random_rows(3, 30)
    drafted = draw_drafts(proposal, 2, Drafting.INDEPENDENT, torch.rand(3, 2, dtype=torch.float64))
    assert torch.equal(*(each.chances(target, proposal, drafted) for each in (Importance(), ImportanceByProgram())))


def test_any_rounds_keep_the_targets_distribution():
    for rounds in (0, 1):
        for target, proposal in pairs(10):
            check_pair(Rough(rounds=rounds), target, proposal)


class Rough(Importance):
    """Without a promise."""

    @property
    def guarantee(self) -> float:
        return 0.0


def test_levels_that_tokens_share_keep_the_targets_distribution():
    """Of 30 tokens most are in levels with others."""
    target, proposal = random_rows(1, 30)
    drafted = torch.cartesian_prod(torch.arange(30), torch.arange(30))
    found = Importance(levels=16).chances(target.expand(900, -1), proposal.expand(900, -1), drafted)
    law = (proposal[0][drafted].prod(-1, keepdim=True) * found).sum(0)
    torch.testing.assert_close(law, target[0], rtol=0, atol=1e-13)


def test_the_gain_of_weights_is_that_of_an_enumeration():
    weight = torch.tensor([[1.0, 0.3, 1.0, 0.02, 0.5]], dtype=torch.float64)
    drawn = torch.tensor([[0.1, 0.2, 0.3, 0.25, 0.15]], dtype=torch.float64)
    block = torch.tensor([[0, 0, 1, 1, 2]])
    for count in (1, 2, 3):
        drafted = torch.cartesian_prod(*[torch.arange(5)] * count).view(-1, count)
        places = block[0][drafted]
        share = weight[0][drafted] * (places == places.amax(-1, keepdim=True))
        share = share / share.sum(-1, keepdim=True) * drawn[0][drafted].prod(-1, keepdim=True)
        chosen = torch.zeros(5, dtype=torch.float64).scatter_add(0, drafted.flatten(), share.flatten())
        found, _ = gains(weight, drawn, block, torch.tensor([[count]]))
        torch.testing.assert_close(found[0] * drawn[0], chosen, rtol=0, atol=1e-13)


def test_the_concave_majorant_is_the_least():
    """Above all points, with falling slopes, and on a point wherever the slope changes."""
    generator = torch_generator(0, "test/majorant")
    across, up = torch.rand(2, 50, 9, generator=generator, dtype=torch.float64).cumsum(-1)
    slopes = majorant(across, up)
    steps = torch.diff(across, prepend=torch.zeros(50, 1, dtype=torch.float64), dim=-1)
    height = (slopes * steps).cumsum(-1)
    assert (slopes[:, 1:] <= slopes[:, :-1] + 1e-12).all()
    assert (height >= up - 1e-12).all()
    bends = slopes[:, 1:] < slopes[:, :-1] - 1e-9
    torch.testing.assert_close(height[:, :-1][bends], up[:, :-1][bends])
    torch.testing.assert_close(height[:, -1], up[:, -1])


def test_exponentials_of_all_rates_are_integrated():
    nodes, weights = half_line(1e-9, torch.device("cpu"))
    for rate in (1.0, 0.37, 1e-3, 1e-9):
        assert (weights * rate * (-rate * nodes).exp()).sum().item() == pytest.approx(1, abs=1e-13)
    assert (weights * nodes**2 * (-nodes).exp()).sum().item() == pytest.approx(math.factorial(2), abs=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_a_real_vocabulary_in_float32(name):
    """Over many draws no more than the optimum is accepted, and greedy stays greedy."""
    verifier, rows, count = POLICIES[name], 200, min(4, POLICIES[name].most or 4)
    target, proposal = random_rows(2, 5000, dtype=torch.float32)
    uniform = torch.rand(2 * rows, count, generator=torch_generator(1, "test/verifiers"), dtype=torch.float64)
    target, proposal = (each.repeat(rows, 1) for each in (target, proposal))
    drafted = draw_drafts(proposal, count, verifier.drafting, uniform)
    found = verifier.chances(target, proposal, drafted)
    torch.testing.assert_close(found.sum(-1), torch.ones(2 * rows), rtol=0, atol=1e-4)
    best = optimal_acceptance(target[:2], proposal[:2], count, verifier.drafting)[:, -1]
    accepted = hits(found, drafted).view(rows, 2).double()
    error = accepted.std(0) / math.sqrt(rows)
    assert (accepted.mean(0) <= best + 4 * error + 1e-5).all()
    assert (accepted.mean(0) >= verifier.guarantee * best - 4 * error - 1e-5).all()
    greedy = torch.zeros_like(target).scatter(-1, target.argmax(-1, keepdim=True), 1)
    torch.testing.assert_close(verifier.chances(greedy, proposal, drafted), greedy, rtol=0, atol=1e-6)


def test_greedy_drafts_accept_the_likeliest_and_what_both_have_of_the_others():
    target, proposal = random_rows(1, 40)
    verifier = POLICIES["greedy_drafts"]
    certain = proposal[0].topk(3).indices
    others = proposal[0].clone()
    others[certain] = 0
    others /= others.sum()
    drafted = torch.cat([certain.expand(40, -1), torch.arange(40).unsqueeze(-1)], -1)[others > 0]
    rows = len(drafted)
    found = verifier.chances(target.expand(rows, -1), proposal.expand(rows, -1), drafted)
    accepted = (others[drafted[:, -1]] * hits(found, drafted)).sum()
    wanted = target[0][certain].sum() + torch.minimum(target[0], others).sum()
    assert accepted.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert verifier.drafting is Drafting.GREEDY
