"""Two steps: choose one draft by importance, then accept or reject it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from penstock.policy import policy
from penstock.speculate.drafting import Drafting
from penstock.speculate.quadrature import half_line
from penstock.speculate.verifiers.contract import Example, Verifier
from penstock.speculate.verifiers.residual import accepted, at, leftover, mixed

#: Weights within a block are kept above this share of the largest.
LEAST = 1e-4

#: How far one round may take a weight: the power of the quotient by which it is corrected.
POWER = 4.0

#: Bounds of p / q between the levels that unlikely tokens share.
BOUNDS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@policy("speculate.verifier", "importance", papers=[50])
class Importance(Verifier):
    """Chooses one of the drafts by importance, then accepts or rejects it as a single draft from the chosen's law.

    From the paper: the two steps, and that they lose nothing against the best of all schemes, where the choice is
    right. The choice is described there by a linear program over all sets of drafts, which only the smallest
    vocabularies allow. Ours: the choice by weights, one of the drafts i with probability w(x_i) / sum of w(x_j). Of all
    choices by which the chosen token has a given law there is one of this form, that of the greatest entropy, so
    nothing is lost, and a weight for each token is all there is to find (:func:`fitted`). The likeliest tokens of the
    proposal have a weight of their own, the others share a few by p / q. For a vocabulary that has no others the
    acceptance tends to the optimum with ``rounds``; the target's law is kept at any number.

    Attributes:
        levels: how many weights.
        rounds: how often they are corrected.
    """

    levels: Annotated[int, Field(ge=16, le=256)] = 32
    rounds: Annotated[int, Field(ge=0, le=10_000)] = 8

    @property
    def drafting(self) -> Drafting:
        return Drafting.INDEPENDENT

    @property
    def guarantee(self) -> float:
        return 0.95

    def chances(self, target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
        counts = (drafted >= 0).sum(-1, keepdim=True).clamp(min=1)
        level = self._level(target, proposal)
        shape = len(target), min(self.levels, target.shape[-1] + len(BOUNDS) + 1)
        wanted, drawn = (
            torch.zeros(shape, dtype=torch.float64, device=each.device).scatter_add(-1, level, each.double())
            for each in (target, proposal)
        )
        choice = fitted(wanted, drawn, counts, self.rounds)
        chosen = proposal * choice.gain.to(proposal.dtype).gather(-1, level)
        # Of the drafts in the highest block, one by weight.
        own = level.gather(-1, drafted.clamp(min=0))
        block = choice.block.gather(-1, own).where(drafted >= 0, -1)
        weight = choice.weight.gather(-1, own) * ((block == block.amax(-1, keepdim=True)) & (drafted >= 0))
        share = (weight / weight.sum(-1, keepdim=True).clamp(min=LEAST)).to(target.dtype)
        taken = share * accepted(at(target, drafted), at(chosen, drafted))
        return mixed(taken, drafted, leftover(target, chosen).where(drafted[:, :1] >= 0, target))

    def _level(self, target: Tensor, proposal: Tensor) -> Tensor:
        """Which weight each token has, int64 [R, V]."""
        bounds = torch.tensor(BOUNDS, dtype=target.dtype, device=target.device)
        level = torch.bucketize((target / proposal).nan_to_num(0), bounds)
        alone = min(self.levels - len(BOUNDS) - 1, target.shape[-1])
        likeliest = proposal.topk(alone, -1).indices
        places = torch.arange(len(BOUNDS) + 1, len(BOUNDS) + 1 + alone, device=target.device)
        return level.scatter(-1, likeliest, places.expand_as(likeliest))

    @classmethod
    def example(cls) -> Example:
        # Two drafts: whoever has the second token chooses it, and the first is chosen before the third. So they are
        # chosen with 7/16, 8/16 and 1/16, and min(p, .) is 7/16, 4/16, 0.
        return Example([0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [0.5, 0.6875])


class Choice(NamedTuple):
    """A choice among drafts by their levels: the highest block decides, and within it the weights.

    Attributes:
        block: int64 [R, L].
        weight: float64 [R, L], the largest of a block 1.
        gain: float64 [R, L], how many times likelier a token is chosen than it is drafted by one draft.
    """

    block: Tensor
    weight: Tensor
    gain: Tensor


def fitted(wanted: Tensor, drawn: Tensor, counts: Tensor, rounds: int) -> Choice:
    """The choice among ``counts`` int64 [R, 1] drafts by which levels are chosen as nearly as possible as they are
    wanted, after so many rounds of correction.

    Args:
        wanted, drawn: float64 [R, L], the target's and the proposal's probability of each level.
    """
    order = torch.where(drawn > 0, wanted / drawn, torch.inf).argsort(-1)
    place = order.argsort(-1)
    wanted, drawn = wanted.gather(-1, order), drawn.gather(-1, order)
    slope = majorant(wanted.cumsum(-1), drawn.cumsum(-1).clamp(max=1) ** counts)
    aim = wanted * slope
    falls = slope[:, 1:] < slope[:, :-1] * (1 - 1e-9)
    block = torch.cat([torch.zeros_like(counts), falls.long().cumsum(-1)], -1)
    same = block.unsqueeze(-1) == block.unsqueeze(-2)
    weight = torch.where((drawn > 0) & (wanted > 0), wanted / drawn, 1.0)
    for number in range(rounds + 1):
        weight = (weight / torch.where(same, weight.unsqueeze(-2), 0).amax(-1)).clamp(min=LEAST)
        gain, response = gains(weight, drawn, block, counts)
        if number < rounds:
            short = aim / (drawn * gain)
            step = short.clamp(1e-2, 1e2) ** (1 / response.clamp(min=1 / POWER))
            weight = torch.where((drawn > 0) & (aim > 0), weight * step, weight)
    return Choice(*(each.gather(-1, place) for each in (block, weight, gain)))


def majorant(across: Tensor, up: Tensor) -> Tensor:
    """The slopes [R, L] of the least concave function above the points (0, 0) and (across, up), [R, L] each, both
    rising: over the way from each point to the next."""
    x, y = (torch.nn.functional.pad(each, (1, 0)) for each in (across, up))
    # From each point a to each later one b; the slope behind a is the least over all a so far of the steepest ahead.
    rise = (y.unsqueeze(-2) - y.unsqueeze(-1)) / (x.unsqueeze(-2) - x.unsqueeze(-1)).clamp(min=1e-300)
    later = torch.ones_like(rise, dtype=torch.bool).triu(1)
    steepest = rise.masked_fill(~later, -torch.inf).flip(-1).cummax(-1).values.flip(-1)
    least = steepest.masked_fill(~later, torch.inf).cummin(-2).values
    return least.diagonal(1, -2, -1)


def gains(weight: Tensor, drawn: Tensor, block: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """How many times likelier each level is chosen than it is drafted by one of ``counts`` drafts, float64 [R, L]; and
    by which power of its weight this rises.

    A level of weight w is chosen with n q E[w / (w + S)], S being the sum of the other drafts' weights, and w / (w + S)
    is the integral of w exp(-w s) exp(-S s) over s > 0, in which the expectation of exp(-S s) is a power. Drafts of
    lower blocks weigh nothing, those of higher ones all.
    """
    nodes, widths = half_line(LEAST, weight.device)
    decay = (-weight.unsqueeze(-1) * nodes).exp()
    same = (block.unsqueeze(-1) == block.unsqueeze(-2)) * drawn.unsqueeze(-2)
    below = ((block.unsqueeze(-1) > block.unsqueeze(-2)) * drawn.unsqueeze(-2)).sum(-1, keepdim=True)
    other = (below + same @ decay).clamp(max=1) ** (counts - 1).unsqueeze(-1)
    rate = counts.unsqueeze(-1) * weight.unsqueeze(-1) * decay * other * widths
    gain = rate.sum(-1)
    return gain, 1 - (rate * weight.unsqueeze(-1) * nodes).sum(-1) / gain
