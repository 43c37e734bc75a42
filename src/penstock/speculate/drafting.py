"""How several drafted tokens of one place are drawn from a proposal."""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from penstock.models.sampling import draw


class Drafting(enum.StrEnum):
    """How the drafted tokens of one place are drawn from the proposal's distribution."""

    INDEPENDENT = "independent"  #: each from the whole proposal, so that a token may be drafted twice
    DISTINCT = "distinct"  #: without replacement: each from the proposal without those before it
    GREEDY = "greedy"  #: all but the last are the likeliest; the last one is drawn from the others


def draw_drafts(proposal: Tensor, count: int, drafting: Drafting, uniform: Tensor) -> Tensor:
    """Drafted tokens int64 [R, count] of R places; -1 behind the last one where the proposal has fewer tokens.

    Args:
        proposal: probabilities [R, V].
        count: how many to draft, 1 or more.
        uniform: float64 [R, count] in [0, 1), a number for each draft.
    """
    if drafting is Drafting.INDEPENDENT:
        return torch.stack([draw(proposal, each) for each in uniform.unbind(-1)], -1)
    first = []
    if drafting is Drafting.GREEDY and count > 1:
        likeliest = proposal.topk(min(count - 1, proposal.shape[-1]), -1)
        first = list(likeliest.indices.where(likeliest.values > 0, -1).unbind(-1))
        proposal = proposal.scatter(-1, likeliest.indices, 0)
    for each in uniform.unbind(-1)[len(first) :]:
        left = proposal.sum(-1) > 0
        token = draw(proposal, each).where(left, 0)
        proposal = proposal.scatter(-1, token.unsqueeze(-1), 0)
        first.append(token.where(left, -1))
    return torch.stack(first, -1)
