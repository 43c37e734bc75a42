"""Recursive rejection sampling over drafts that were drawn independently."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.policy import policy
from penstock.speculate.drafting import Drafting
from penstock.speculate.verifiers.contract import Example, Verifier
from penstock.speculate.verifiers.residual import accepted, at, leftover, mixed


@policy("speculate.verifier", "recursive")
class Recursive(Verifier):
    """Accepts or rejects one draft after the other, each against what the rejections before it left of the target.

    The second draft faces the residual as if it were the target, and so on; after the last rejection the token is drawn
    from the last residual. Known as recursive or multi-round rejection sampling, here with replacement.
    """

    @property
    def drafting(self) -> Drafting:
        return Drafting.INDEPENDENT

    def chances(self, target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
        rejected, chosen = torch.ones_like(target[:, :1]), []
        for token in drafted.unsqueeze(-1).unbind(1):
            taken = accepted(at(target, token), at(proposal, token))
            chosen.append(rejected * taken)
            rejected = rejected * (1 - taken)
            target = leftover(target, proposal).where(token >= 0, target)
            proposal = self._next(proposal, token)
        return mixed(torch.cat(chosen, -1), drafted, target)

    def _next(self, proposal: Tensor, token: Tensor) -> Tensor:
        """What the draft behind ``token`` [R, 1] was drawn from."""
        return proposal

    @classmethod
    def example(cls) -> Example:
        # p and q have min(p, q) = 1/4, 1/4, 0; the residual is all on the second token, which q drafts in 1 of 4.
        return Example([0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [0.5, 0.625])
