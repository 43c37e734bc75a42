"""Softmax routing: the most probable experts, weighted by their probabilities."""

from __future__ import annotations

import math

from torch import Tensor

from penstock.models.routers.contract import Example, Router, Routing
from penstock.ops.experts import top_few
from penstock.policy import policy


@policy("moe.router", "softmax")
class SoftmaxRouter(Router):
    """Softmax over all experts, then the top k; ``normalize`` makes their weights sum to one.

    Mixtral and Qwen3-MoE route this way (``normalize`` on; it is ``norm_topk_prob`` in their configurations).
    """

    normalize: bool = True

    def route(self, logits: Tensor, bias: Tensor | None = None) -> Routing:
        probabilities = logits.softmax(-1)
        weights, experts = top_few(probabilities, self.top_k)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(experts, weights, probabilities)

    @classmethod
    def example(cls) -> Example:
        # Probabilities 1/8, 1/8, 1/4, 1/2, and the same the other way round.
        row = [0.0, 0.0, math.log(2), math.log(4)]
        return Example(cls(top_k=2), [row, row[::-1]], [[0.0, 0.0, 1 / 3, 2 / 3], [2 / 3, 1 / 3, 0.0, 0.0]])
