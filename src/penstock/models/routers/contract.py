"""The contract ``moe.router``."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from pydantic import PositiveInt
from torch import Tensor

from penstock.policy import Policy, contract, unwritten


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where N tokens go.

    Attributes:
        experts: int64 [N, k], distinct within a row.
        weights: [N, k] in the dtype of the logits.
        probabilities: [N, experts], rows that sum to 1: how much each expert was wanted, chosen or not. What spreads
            them evenly spreads the tokens, which is what the loss for balance does.
    """

    experts: Tensor
    weights: Tensor
    probabilities: Tensor


class Example(NamedTuple):
    """A router, with what it makes of the logits of some tokens.

    Attributes:
        router: the router, with a ``top_k`` below the number of experts.
        logits: for each token, of every expert.
        weights: for each token, the weight of every expert, 0 for those that are not chosen.
        bias: moves the choice, where the router keeps such a bias.
    """

    router: Router
    logits: list[list[float]]
    weights: list[list[float]]
    bias: list[float] | None = None


@contract(
    "moe.router",
    law="experts distinct, each token routed on its own, and weights equal to those that the policy gives for some "
    "tokens, worked out by hand; a selection bias moves the choice alone; the routed block equals the dense loop over "
    "all experts; the loss for balance is 1 a token for an even load, more for a collapsed one, and falls along its "
    "gradient",
)
class Router(Policy):
    """Picks ``top_k`` experts for each token.

    A policy gives :meth:`route`, and :meth:`example` for its law.
    """

    top_k: PositiveInt = 2

    def route(self, logits: Tensor, bias: Tensor | None = None) -> Routing:
        """Routes by ``logits`` [N, experts] (float32 or float64).

        ``bias`` [experts] moves the choice of experts but not their weights; routers without such a bias ignore it.
        """
        raise NotImplementedError

    @classmethod
    def example(cls) -> Example:
        """A router of this kind, and its weights for the logits of a few tokens.

        Work them out by hand, or take them from the paper: the law holds the code against them.
        """
        raise unwritten(cls, "example()", "return Example(router, logits, weights) for a few tokens")

    @property
    def biased(self) -> bool:
        """Whether the block keeps a per-expert selection bias for this router."""
        return False
