"""Next-token prediction."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import PositiveInt
from torch import Tensor

from penstock.data.loader import Batch
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE, linear_cross_entropy
from penstock.policy import policy
from penstock.train.objectives.contract import Example, Objective


@policy("train.objective", "next_token")
class NextToken(Objective):
    """Cross-entropy of each next token, plus the load-balancing loss of sparse layers weighted as the model says.

    ``chunk`` tokens' logits exist at a time.
    """

    cross_entropy: ClassVar[bool] = True

    chunk: PositiveInt = 2048

    def hidden_loss(self, model: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
        rows, targets, cap = hidden.flatten(0, -2), batch.targets.flatten(), model.config.logits_cap
        return linear_cross_entropy(rows, model.head.weight, targets, chunk=self.chunk, cap=cap)

    @classmethod
    def example(cls) -> Example:
        # Probabilities 1/4, 1/4 and 1/2, and then 1/8, 3/8 and 1/2; of the token between, nothing is asked.
        scores = [[0.0, 0.0, math.log(2)], [5.0, -5.0, 0.0], [0.0, math.log(3), math.log(4)]]
        return Example(cls(), scores, [2, IGNORE, 0], math.log(16))
