"""One draft: accept it, or draw from the residual."""

from __future__ import annotations

from torch import Tensor

from penstock.core.errors import UsageError
from penstock.policy import policy
from penstock.speculate.drafting import Drafting
from penstock.speculate.verifiers.contract import Example, Verifier
from penstock.speculate.verifiers.residual import accepted, at, leftover, mixed


@policy("speculate.verifier", "accept_residual", papers=[63])
class AcceptResidual(Verifier):
    """Accepts the one draft x with probability min(1, p(x) / q(x)), or draws from what p has beyond q.

    p is the target, q the proposal. It accepts with probability sum of min(p, q), which no verifier of one draft
    exceeds.
    """

    @property
    def drafting(self) -> Drafting:
        return Drafting.INDEPENDENT

    @property
    def most(self) -> int:
        return 1

    @property
    def guarantee(self) -> float:
        return 1.0

    def chances(self, target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
        if drafted.shape[-1] > 1:
            raise UsageError(
                f"accept_residual verifies one draft of a place, and there are {drafted.shape[-1]}",
                hint="Draft a chain, or take a verifier for several drafts.",
            )
        chosen = accepted(at(target, drafted), at(proposal, drafted))
        return mixed(chosen, drafted, leftover(target, proposal).where(drafted >= 0, target))

    @classmethod
    def example(cls) -> Example:
        # min(p, q) is 1/4, 1/4, 0.
        return Example([0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [0.5])
