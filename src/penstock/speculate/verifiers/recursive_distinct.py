"""Recursive rejection sampling over drafts that were drawn without replacement."""

from __future__ import annotations

from torch import Tensor

from penstock.policy import policy
from penstock.speculate.drafting import Drafting
from penstock.speculate.verifiers.contract import Example
from penstock.speculate.verifiers.recursive import Recursive
from penstock.speculate.verifiers.residual import without


@policy("speculate.verifier", "recursive_distinct")
class RecursiveDistinct(Recursive):
    """Recursive rejection in which each draft is drawn from the proposal without those before it.

    No draft is wasted on a token that was rejected already.
    """

    @property
    def drafting(self) -> Drafting:
        return Drafting.DISTINCT

    def _next(self, proposal: Tensor, token: Tensor) -> Tensor:
        return without(proposal, token)

    @classmethod
    def example(cls) -> Example:
        # As with replacement, but the second draft is drawn from 1/4, 1/4 behind the first token, and from 1/2, 1/4
        # behind the third: the second token has 1/2 and 1/3 there. The first token is rejected with probability
        # 1/2 * 1/2, the third with 1/4.
        return Example([0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [0.5, 0.5 + 1 / 8 + 1 / 12])
