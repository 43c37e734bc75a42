"""Sigmoid routing: each expert scored on its own, with a selection bias that can balance load without a loss."""

from __future__ import annotations

import math

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from penstock.models.routers.contract import Example, Router, Routing
from penstock.models.routers.groups import outside
from penstock.ops.experts import top_few
from penstock.policy import policy


@policy("moe.router", "sigmoid")
class SigmoidRouter(Router):
    """Sigmoid scores; the top k of score plus bias, weighted by their scores times ``scale``, which ``normalize`` makes
    sum to it.

    DeepSeek-V3's rule. With ``groups``, the k are of the ``kept_groups`` whose two best experts score the most. The
    bias only selects, as there: it never enters the weights; without ``bias`` there is none.
    """

    scale: PositiveFloat = 1.0
    normalize: bool = True
    bias: bool = True
    groups: PositiveInt = 1
    kept_groups: PositiveInt = 1

    @property
    def biased(self) -> bool:
        return self.bias

    def route(self, logits: Tensor, bias: Tensor | None = None) -> Routing:
        scores = logits.sigmoid()
        among = scores if bias is None or not self.bias else scores + bias
        if self.groups > self.kept_groups:
            among = among.masked_fill(outside(among, self.groups, self.kept_groups, counted=2), -math.inf)
        _, experts = top_few(among, self.top_k)
        weights = scores.gather(-1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, self.scale * weights, scores / scores.sum(-1, keepdim=True))

    @classmethod
    def example(cls) -> Example:
        # Scores 1/2, 3/4, 1/4 and 4/5; with its bias the first expert comes before the second, with its own weight.
        row = [0.0, math.log(3), -math.log(3), math.log(4)]
        weights = [2 * 0.5 / 1.3, 0.0, 0.0, 2 * 0.8 / 1.3]
        return Example(cls(top_k=2, scale=2), [row], [weights], bias=[0.26, 0.0, 0.0, 0.0])
