"""Sigmoid routing: each expert scored on its own, with a selection bias that can balance load without a loss."""

from __future__ import annotations

from pydantic import PositiveFloat
from torch import Tensor

from penstock.models.routers.contract import Router, Routing
from penstock.policy import policy


@policy("moe.router", "sigmoid")
class SigmoidRouter(Router):
    """Sigmoid scores; the top k of score plus bias, weighted by their scores normalised to ``scale``.

    DeepSeek-V3's rule without its expert groups. The bias only selects, as there: it never enters the weights.
    """

    scale: PositiveFloat = 1.0

    @property
    def biased(self) -> bool:
        return True

    def route(self, logits: Tensor, bias: Tensor | None = None) -> Routing:
        scores = logits.sigmoid()
        experts = (scores if bias is None else scores + bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        weights = self.scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights, scores / scores.sum(-1, keepdim=True))
