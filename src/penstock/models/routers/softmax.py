"""Softmax routing: the most probable experts, weighted by their probabilities."""

from __future__ import annotations

import math

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from penstock.models.routers.contract import Example, Router, Routing
from penstock.models.routers.groups import outside
from penstock.ops.experts import top_few
from penstock.policy import policy


@policy("moe.router", "softmax")
class SoftmaxRouter(Router):
    """Softmax over all experts, then the top k; ``normalize`` makes their weights sum to one, and ``scale`` multiplies
    them.

    Mixtral and Qwen3-MoE route this way (``normalize`` on; it is ``norm_topk_prob`` in their configurations). With
    ``groups``, the k are of the ``kept_groups`` whose best experts are the most probable (DeepSeek-V2).
    """

    normalize: bool = True
    scale: PositiveFloat = 1.0
    groups: PositiveInt = 1
    kept_groups: PositiveInt = 1

    def route(self, logits: Tensor, bias: Tensor | None = None) -> Routing:
        probabilities = logits.softmax(-1)
        among = probabilities
        if self.groups > self.kept_groups:
            among = among.masked_fill(outside(among, self.groups, self.kept_groups, counted=1), 0.0)
        weights, experts = top_few(among, self.top_k)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(experts, weights * self.scale, probabilities)

    @classmethod
    def example(cls) -> Example:
        # Probabilities 1/8, 1/8, 1/4, 1/2, and the same the other way round; the chosen weights sum to the scale.
        row = [0.0, 0.0, math.log(2), math.log(4)]
        weights = [[0.0, 0.0, 1.0, 2.0], [2.0, 1.0, 0.0, 0.0]]
        return Example(cls(top_k=2, scale=3), [row, row[::-1]], weights)
