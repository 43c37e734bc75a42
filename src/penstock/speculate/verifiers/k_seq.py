"""K-SEQ: sequential selection with one threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.policy import policy
from penstock.speculate.drafting import Drafting
from penstock.speculate.verifiers.contract import Example, Verifier
from penstock.speculate.verifiers.residual import at, leftover, mixed


@policy("speculate.verifier", "k_seq", papers=[306])
class KSeq(Verifier):
    """Accepts the first of n drafts that passes min(1, p(x) / (rho q(x))), with one rho for all of them.

    p is the target, q the proposal. A draft passes with probability beta = sum of min(q, p / rho), so x is accepted
    with min(q, p / rho) times s = 1 + (1 - beta) + ... + (1 - beta)^(n - 1). That is no more than p where rho >= s, and
    the least such rho, found by bisection between 1 and n, lets the most pass; else the token is drawn from what p has
    beyond it. At least 1 - (1 - 1/n)^n of the optimal acceptance, so more than 1 - 1/e.
    """

    @property
    def drafting(self) -> Drafting:
        return Drafting.INDEPENDENT

    @property
    def guarantee(self) -> float:
        return 1 - 1 / math.e

    def chances(self, target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
        counts = (drafted >= 0).sum(-1, keepdim=True).clamp(min=1)
        factor = least_factor(target, proposal, counts)
        wanted, drawn = at(target, drafted), at(proposal, drafted)
        passes = torch.where(drawn > 0, wanted / (factor * drawn), 0).clamp(max=1)
        before = (1 - passes).cumprod(-1).roll(1, -1)
        before[:, 0] = 1
        once = torch.minimum(proposal, target / factor)
        taken = once * attempts(once.sum(-1, keepdim=True), counts)
        return mixed(before * passes, drafted, leftover(target, taken).where(drafted[:, :1] >= 0, target))

    @classmethod
    def example(cls) -> Example:
        # Two drafts: where q exceeds p / rho and not, min(q, p / rho) is 1/(4 rho), 1/4, 0 as long as rho <= 3. With
        # beta = 1/4 + 1/(4 rho), rho = 2 - beta has the solution rho^2 - 7/4 rho + 1/4 = 0.
        factor = (7 / 4 + math.sqrt(49 / 16 - 1)) / 2
        beta = 1 / 4 + 1 / (4 * factor)
        return Example([0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [0.5, 1 - (1 - beta) ** 2])


def least_factor(target: Tensor, proposal: Tensor, counts: Tensor) -> Tensor:
    """The least rho [R, 1] for ``counts`` int64 [R, 1] drafts, from above, so that it is never too small."""
    low = torch.ones_like(target[:, :1])
    high = counts.to(target.dtype)
    for _ in range(bits(target.dtype)):
        middle = (low + high) / 2
        beta = torch.minimum(proposal, target / middle).sum(-1, keepdim=True)
        enough = middle >= attempts(beta, counts)
        low, high = low.where(enough, middle), middle.where(enough, high)
    return high


def attempts(beta: Tensor, counts: Tensor) -> Tensor:
    """How many of ``counts`` int64 [R, 1] drafts are tried in the mean until one passes, each with probability ``beta``
    [R, 1]: (1 - (1 - beta)^counts) / beta."""
    any_passes = -(counts * (-beta.clamp(max=1)).log1p()).expm1()
    return torch.where(beta > 0, any_passes / beta, counts)


def bits(dtype: torch.dtype) -> int:
    """How often an interval can be halved before its ends are neighbours in ``dtype``."""
    return round(1 - math.log2(torch.finfo(dtype).eps))
