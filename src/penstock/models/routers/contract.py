"""The contract ``moe.router``."""

from __future__ import annotations

import dataclasses

from pydantic import PositiveInt
from torch import Tensor

from penstock.policy import Policy, contract


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


@contract("moe.router", law="the routed block equals the dense loop over all experts with the router's weights")
class Router(Policy):
    """Picks ``top_k`` experts for each token."""

    top_k: PositiveInt = 2

    def route(self, logits: Tensor, bias: Tensor | None = None) -> Routing:
        """Routes by ``logits`` [N, experts] (float32 or float64).

        ``bias`` [experts] moves the choice of experts but not their weights; routers without such a bias ignore it.
        """
        raise NotImplementedError

    @property
    def biased(self) -> bool:
        """Whether the block keeps a per-expert selection bias for this router."""
        return False
