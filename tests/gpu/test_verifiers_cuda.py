"""Verifiers on a GPU: what they are on the CPU, also with a large vocabulary."""

from __future__ import annotations

import pytest
import torch

from penstock.core.randomness import torch_generator
from penstock.speculate.bound import optimal_acceptance
from penstock.speculate.drafting import Drafting, draw_drafts
from penstock.testing.enrolled import enrolled

pytestmark = pytest.mark.gpu
POLICIES = enrolled("speculate.verifier")


def rows(number: int, vocabulary: int, dtype: torch.dtype):
    """Targets and proposals that have something in common, with tokens that only one of them has."""
    generator = torch_generator(0, "test/verifiers")
    both, one, other = torch.randn(3, number, vocabulary, generator=generator, dtype=torch.float64)
    target, proposal = (3 * both + one).softmax(-1), (3 * both + other).softmax(-1)
    target[:, ::7] = 0
    proposal[:, ::5] = 0
    return tuple((each / each.sum(-1, keepdim=True)).to(dtype) for each in (target, proposal))


def drafts(verifier, proposal):
    """Up to four drafts of each row."""
    count = min(4, verifier.most or 4)
    uniform = torch.rand(len(proposal), count, generator=torch_generator(1, "test/verifiers"), dtype=torch.float64)
    drafted = draw_drafts(proposal, count, verifier.drafting, uniform)
    drafted[::3, -1] = -1
    return drafted


@pytest.mark.parametrize("name", POLICIES)
def test_chances_are_those_of_the_cpu(name):
    target, proposal = rows(32, 1000, torch.float64)
    drafted = drafts(POLICIES[name], proposal)
    found = POLICIES[name].chances(target.cuda(), proposal.cuda(), drafted.cuda())
    torch.testing.assert_close(found.cpu(), POLICIES[name].chances(target, proposal, drafted), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", POLICIES)
def test_a_large_vocabulary_takes_a_few_times_its_own_memory(name):
    target, proposal = rows(64, 151_936, torch.float32)
    drafted = drafts(POLICIES[name], proposal).cuda()
    target, proposal = target.cuda(), proposal.cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = POLICIES[name].chances(target, proposal, drafted)
    assert torch.cuda.max_memory_allocated() - before <= 16 * target.nbytes
    torch.testing.assert_close(found.sum(-1).cpu(), torch.ones(64), rtol=0, atol=1e-4)
    assert not found[target == 0].any()


@pytest.mark.parametrize("drafting", list(Drafting))
def test_the_optimum_is_that_of_the_cpu(drafting):
    target, proposal = rows(4, 1000, torch.float64)
    found = optimal_acceptance(target.cuda(), proposal.cuda(), 4, drafting)
    torch.testing.assert_close(found.cpu(), optimal_acceptance(target, proposal, 4, drafting), rtol=0, atol=1e-10)
