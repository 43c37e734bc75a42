"""The optimal acceptance of several drafts: what no verifier of one place can exceed.

The best verifier is an optimal transport from the drafts to the target's tokens, in which a drafted token that comes
out costs nothing. By the dual of that linear program (Hu et al., "Towards Optimal Multi-draft Speculative Decoding")
the acceptance is the minimum over all sets H of tokens of

    1 + P(H) - W(H),

P(H) being the target's probability of H, and W(H) that all drafts are in H. For drafts that are drawn from the
proposal, with or without replacement, one of the sets that hold the tokens of least p / q reaches the minimum (for
those without it is the paper's, and compared with all sets in the tests): a sort and a scan find it. For greedy drafts
there is a formula.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from penstock.speculate.drafting import Drafting
from penstock.speculate.quadrature import half_line
from penstock.speculate.verifiers.residual import without

#: A token that rings at a rate r has surely rung at a time of this many 1/r: the chance that it has not is below 1e-16.
SURE = 37.0

#: One that has rung with less than this probability counts as never: processors multiply denormal numbers slowly.
NEVER = 1e-25

#: Drafts of a place for which the optimum can be computed; with more, sums of products of exp(SURE) would overflow.
MOST = 12


def optimal_acceptance(target: Tensor, proposal: Tensor, most: int, drafting: Drafting) -> Tensor:
    """The optimal acceptance [R, most] with 1 to ``most`` drafts, float64.

    Args:
        target, proposal: probabilities [R, V].
        most: at most :data:`MOST`.
    """
    if not 1 <= most <= MOST:
        raise ValueError(f"the optimum is computed for 1 to {MOST} drafts, not {most}")
    target, proposal = target.double(), proposal.double()
    if drafting is Drafting.GREEDY:
        return torch.stack([_greedy(target, proposal, count) for count in range(1, most + 1)], -1)
    order = torch.where(proposal > 0, target / proposal, torch.inf).argsort(-1)
    wanted, drawn = target.gather(-1, order).cumsum(-1), proposal.gather(-1, order)
    inside = _independent(drawn, most) if drafting is Drafting.INDEPENDENT else _distinct(drawn, most)
    return 1 + (wanted.unsqueeze(1) - inside).amin(-1).clamp(max=0)


def _greedy(target: Tensor, proposal: Tensor, count: int) -> Tensor:
    """For the likeliest ``count`` - 1 tokens and one drawn among the others: the best set holds all the likeliest and
    those of the others with p < q'."""
    likeliest = proposal.topk(min(count - 1, proposal.shape[-1]), -1)
    certain = likeliest.indices.where(likeliest.values > 0, -1)
    others = without(proposal, certain)
    sure = (target.gather(-1, likeliest.indices) * (likeliest.values > 0)).sum(-1)
    return sure + torch.minimum(target, others).sum(-1)


def _independent(drawn: Tensor, most: int) -> Tensor:
    """The probability [R, most, V] that 1 to ``most`` independent drafts are all among the first tokens, up to each."""
    inside = drawn.cumsum(-1).clamp(max=1)
    return torch.stack([inside**count for count in range(1, most + 1)], 1)


def _distinct(drawn: Tensor, most: int) -> Tensor:
    """The same for drafts without replacement.

    Let each token ring after a time of its own, exponential with its probability as the rate: the drafts are the first
    that ring. They are not all in H if fewer than n of H have rung when the first outside of it does. At the time s a
    token of H has not rung with exp(-q s), so that j of them have with exp(-Q(H) s) e_j, where e_j is the elementary
    symmetric polynomial of exp(q s) - 1 over H; and the first outside rings with density o exp(-o s), where o is the
    probability of all outside. Tokens that have surely rung are counted apart, so that no figure is too large.
    """
    # What is outside is summed from its own end: where little is left, it must not be a difference.
    outside = pad(drawn.flip(-1).cumsum(-1).flip(-1)[:, 1:], (0, 1))
    missing = torch.zeros(len(drawn), most, drawn.shape[-1], dtype=drawn.dtype, device=drawn.device)
    needed = torch.arange(most, device=drawn.device).view(-1, 1)
    slowest = float(drawn.where(drawn > 0, 1).amin())
    for node, width in zip(*half_line(slowest, drawn.device), strict=True):
        pace = drawn * node
        sure = pace > SURE
        rung = sure.cumsum(-1)
        if not ((rung < most) & (outside > 0) & (outside * node < 2 * SURE)).any():
            break  # nothing is open any more, and later there will be no more
        pace = pace.masked_fill(sure, 0)
        none, odds = (-pace.cumsum(-1)).exp(), pace.masked_fill(pace < NEVER, 0).expm1()
        polynomial, at_most = torch.ones_like(drawn), [none]
        for j in range(1, most):
            before = pad(polynomial[:, :-1], (1, 0), value=float(j == 1))  # of no tokens, e_0 is 1
            polynomial = (odds * before).cumsum(-1)
            at_most.append(torch.addcmul(at_most[-1], polynomial, none))
        fewer = torch.stack(at_most, 1)
        if rung.any():
            left = needed - rung.unsqueeze(1)
            fewer = fewer.gather(1, left.clamp(min=0)) * (left >= 0)
        missing.addcmul_(fewer, (width * outside * (-outside * node).exp()).unsqueeze(1))
    return 1 - missing
