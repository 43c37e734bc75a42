"""The contract ``speculate.verifier``: how drafted tokens for one place become the token that comes out.

A verifier says, given what was drafted, with which probability each token of the vocabulary comes out. The token is
then drawn from that distribution with the place's own number (:func:`penstock.models.sampling.draw`). A drafted token
that comes out is accepted: speculation goes on behind it. Any other ends it. So a chain, several chains and a tree are
verified alike, place by place, each with the drafts that follow the tokens accepted so far; and that the output has the
target's distribution is a statement about one place, which can be checked by summing over all drafts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from penstock.policy import Policy, contract, unwritten
from penstock.speculate.drafting import Drafting


class Example(NamedTuple):
    """Two distributions over a few tokens, and what a verifier accepts.

    Attributes:
        target, proposal: probabilities, one for each token.
        acceptance: the probability that the token that comes out is a drafted one, for 1 draft, 2 drafts and so on.
    """

    target: list[float]
    proposal: list[float]
    acceptance: list[float]


@contract(
    "speculate.verifier",
    law="summed over all drafts, the token that comes out has the target's distribution to 1e-12, for any target, "
    "proposal and number of drafts, and so have whole sequences; a token that the target forbids never comes out; the "
    "acceptance is that of the policy's example, worked out by hand, no more than the optimum, at least the share of "
    "it that the policy guarantees, and no less for more drafts; each place is verified on its own",
)
class Verifier(Policy):
    """Verifies the drafted tokens of many places at a time."""

    @property
    def drafting(self) -> Drafting:
        """How the drafts have to be drawn; for drafts drawn otherwise, the target's distribution is not kept."""
        raise NotImplementedError

    @property
    def most(self) -> int | None:
        """How many drafts it verifies for a place, at most; None: any number."""
        return None

    @property
    def matches(self) -> bool:
        """Whether what comes out does not depend on the drafts, nor on what they were drawn from."""
        return False

    @property
    def guarantee(self) -> float:
        """The share of the optimal acceptance (:mod:`penstock.speculate.bound`) that it reaches at least."""
        return 0.0

    def chances(self, target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
        """The distribution [R, V] of the token that comes out of each of R places, given what was drafted there.

        Args:
            target: probabilities [R, V] that the output must have, after temperature, cuts, penalties and grammar.
            proposal: probabilities [R, V], of the same dtype, that the drafts were drawn from. It may lack tokens of
                the target, and have such as the target forbids.
            drafted: int64 [R, k], the drafts in the order in which they were drawn; -1 behind the last of a place. How
                many a place has must not depend on which they are.
        """
        raise NotImplementedError

    @classmethod
    def example(cls) -> Example:
        """Two distributions, and what a verifier of this kind accepts, worked out by hand."""
        raise unwritten(cls, "example()", "return Example(target, proposal, acceptance) for a few tokens")
