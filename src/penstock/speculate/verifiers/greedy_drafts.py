"""Greedy drafts: the likeliest tokens, and one drawn among the others."""

from __future__ import annotations

from torch import Tensor

from penstock.policy import policy
from penstock.speculate.drafting import Drafting
from penstock.speculate.verifiers.contract import Example, Verifier
from penstock.speculate.verifiers.residual import accepted, at, leftover, mixed, without


@policy("speculate.verifier", "greedy_drafts", papers=[316])
class GreedyDrafts(Verifier):
    """Drafts the proposal's likeliest tokens and one drawn among the others, and verifies them optimally.

    The last draft alone is random. It is accepted or rejected as a single draft is, against the proposal q' that is
    left without the likeliest tokens; the residual, from which the token is drawn otherwise, has all of the target's
    probability of those, since q' never drafts them. So the acceptance is p of the likeliest and the sum of min(p, q')
    of the others, which is the optimum for drafts of this kind.
    """

    @property
    def drafting(self) -> Drafting:
        return Drafting.GREEDY

    @property
    def guarantee(self) -> float:
        return 1.0

    def chances(self, target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
        last = (drafted >= 0).sum(-1, keepdim=True) - 1
        drawn = drafted.gather(-1, last.clamp(min=0))
        certain = drafted.scatter(-1, last.clamp(min=0), -1)
        others = without(proposal, certain)
        chosen = accepted(at(target, drawn), at(others, drawn))
        return mixed(chosen, drawn, leftover(target, others).where(drawn >= 0, target))

    @classmethod
    def example(cls) -> Example:
        # With two drafts the first token is certain, and the other is the second or the third with 1/2 each:
        # 1/4 + min(3/4, 1/2) + min(0, 1/2).
        return Example([0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [0.5, 0.75])
