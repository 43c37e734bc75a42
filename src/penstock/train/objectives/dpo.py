"""Direct preference optimization."""

from __future__ import annotations

import math

import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from penstock.data.loader import Batch
from penstock.ops.cross_entropy import IGNORE
from penstock.policy import policy
from penstock.train.objectives.contract import Example
from penstock.train.objectives.preference import Pairs, Preference, of_sequence


@policy("train.objective", "dpo")
class DPO(Preference):
    """-log sigmoid(beta (log p(chosen) / p0(chosen) - log p(rejected) / p0(rejected))) of each pair of answers, where
    p0 is the model at the beginning (Rafailov et al., 2023).

    The log-probabilities of p0 are computed once, before the run, so that no second model is kept. Without
    ``reference``, p0 counts as 1 for all answers.
    """

    beta: PositiveFloat = 0.1
    reference: bool = True

    @property
    def refers(self) -> bool:
        return self.reference

    def pair_loss(self, pairs: Pairs, batch: Batch) -> Tensor:
        margin = pairs.chosen - pairs.rejected
        if "reference" in batch.extras:
            base = of_sequence(batch, batch.extras["reference"].to(margin.dtype))
            margin = margin - (base[:, 0::2] - base[:, 1::2])
        return -F.logsigmoid(self.beta * margin)

    @classmethod
    def example(cls) -> Example:
        # The chosen answer is 1/4 and then 1/2 probable, the rejected one 1/8; at first they were 1/16 and 1/2.
        scores = [[0.0, math.log(3)], [0.0, 0.0], [9.0, 1.0], [math.log(7), 0.0], [0.0, 0.0]]
        reference = [math.log(1 / 16)] * 3 + [math.log(1 / 2)] * 2
        # The odds are (1/8 : 1/16) / (1/8 : 1/2) = 8, of which beta takes the root.
        loss = math.log(1 + 1 / math.sqrt(8))
        return Example(
            cls(beta=0.5), scores, [0, 1, IGNORE, 1, IGNORE], loss, [0, 0, 0, 1, 1], {"reference": reference}
        )
