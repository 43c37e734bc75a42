"""Odds ratio preference optimization."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from penstock.data.loader import Batch
from penstock.ops.cross_entropy import IGNORE
from penstock.policy import policy
from penstock.train.objectives.contract import Example
from penstock.train.objectives.preference import Pairs, Preference


@policy("train.objective", "orpo")
class ORPO(Preference):
    """-log p(chosen) - beta log sigmoid(log odds(chosen) / odds(rejected)) of each pair of answers, p being the
    geometric mean over an answer's tokens and odds(p) = p / (1 - p): fine-tuning and preference in one, without a
    reference (Hong et al., 2024).
    """

    beta: PositiveFloat = 0.1

    def pair_loss(self, pairs: Pairs, batch: Batch) -> Tensor:
        chosen = pairs.chosen / pairs.chosen_tokens.clamp(min=1)
        rejected = pairs.rejected / pairs.rejected_tokens.clamp(min=1)
        return -chosen - self.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    @classmethod
    def example(cls) -> Example:
        # The chosen answer is 1/2 and 1/2 probable, the rejected one 1/4: the odds are 1 and 1/3.
        scores = [[0.0, 0.0], [0.0, 0.0], [5.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]]
        loss = math.log(2) + 0.5 * math.log(1 + 1 / 3)
        return Example(cls(beta=0.5), scores, [0, 1, IGNORE, 1, IGNORE], loss, [0, 0, 0, 1, 1])


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)), with p a little below 1 at most."""
    below = log_probability.clamp(max=-1e-6)
    return below - torch.log(-torch.expm1(below))
