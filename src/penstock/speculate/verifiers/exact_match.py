"""The token of plain decoding, compared with the drafts."""

from __future__ import annotations

from torch import Tensor

from penstock.policy import policy
from penstock.speculate.drafting import Drafting
from penstock.speculate.verifiers.contract import Example, Verifier


@policy("speculate.verifier", "exact_match")
class ExactMatch(Verifier):
    """Draws from the target whatever was drafted, and accepts the draft that is the same.

    The rule for greedy decoding, where every verifier comes to this, and for drafts that are tokens without a
    distribution. It needs no proposal, and the tokens are those of plain decoding draw for draw. Other verifiers accept
    more of what was drawn from a distribution. Drafts may be drawn in any way; the likeliest are accepted most.
    """

    @property
    def drafting(self) -> Drafting:
        return Drafting.GREEDY

    @property
    def matches(self) -> bool:
        return True

    def chances(self, target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
        return target

    @classmethod
    def example(cls) -> Example:
        # One draft is right with probability 1/8 + 3/16 + 0. Of two, the first token is always one, and the other is
        # the second or the third with 1/2 each.
        return Example([0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [0.3125, 0.625])
