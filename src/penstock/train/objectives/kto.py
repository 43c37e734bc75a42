"""Kahneman-Tversky optimization."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor

from penstock.data.chats.examples import Kind
from penstock.data.loader import Batch
from penstock.ops.cross_entropy import IGNORE
from penstock.policy import policy
from penstock.train.objectives.contract import Example
from penstock.train.objectives.preference import Pairs, Preference, of_sequence


@policy("train.objective", "kto")
class KTO(Preference):
    """sigmoid(beta (z - r)) of each good answer, and sigmoid(beta (r - z)) of each bad one, in ``data.ratings``: r is
    log p / p0, z its mean over answers to other questions, not below 0, and p0 the model at the beginning (Ethayarajh
    et al., 2024).

    ``good`` and ``bad`` weigh the two kinds; where there are more of one, let good answers times ``good`` be 1 to 4/3
    of bad ones times ``bad``, as the paper advises. No gradient goes through z. Ours: z is the mean over the answers of
    a row, where other programs take those of a microbatch, so that the loss does not depend on how a batch is shared.
    """

    learns_from: ClassVar[Kind] = "ratings"
    unit: ClassVar[str] = "answer"

    beta: PositiveFloat = 0.1
    good: PositiveFloat = 1.0
    bad: PositiveFloat = 1.0

    @property
    def refers(self) -> bool:
        return True

    def pair_loss(self, pairs: Pairs, batch: Batch) -> Tensor:
        # A pair is the conversation with its own answer, and then with that to another question.
        reference = of_sequence(batch, batch.extras["reference"].to(pairs.chosen.dtype))
        reward, foreign = pairs.chosen - reference[:, 0::2], (pairs.rejected - reference[:, 1::2]).detach()
        there = pairs.there.to(foreign.dtype)
        z = ((foreign * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)).clamp(min=0)
        wanted = of_sequence(batch, batch.extras["label"])[:, 0::2] > 0.5
        gain = self.beta * torch.where(wanted, reward - z, z - reward)
        return torch.where(wanted, self.good, self.bad) * torch.sigmoid(-gain)

    @classmethod
    def example(cls) -> Example:
        # A bad answer is 1/2 and then 1/4 probable, and was 1/32: r = log 4. One to another question is 1/2 probable,
        # and was 1/4: z = log 2. With beta = 1 the loss is 1 - 1 / (1 + exp(log 4 - log 2)) = 2/3, three times.
        scores = [[0.0, 0.0], [math.log(3), 0.0], [5.0, 0.0], [0.0, 0.0], [0.0, 5.0]]
        reference = [math.log(1 / 32)] * 3 + [math.log(1 / 4)] * 2
        extras = {"reference": reference, "label": [0.0] * 5}
        return Example(cls(beta=1.0, bad=3.0), scores, [0, 1, IGNORE, 1, IGNORE], 2.0, [0, 0, 0, 1, 1], extras)
