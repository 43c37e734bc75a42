"""Reward models."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.data.loader import Batch
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE
from penstock.policy import policy
from penstock.train.objectives.contract import Example
from penstock.train.objectives.preference import Pairs, Preference


@policy("train.objective", "reward")
class Reward(Preference):
    """-log sigmoid(r(chosen) - r(rejected)) of each pair of answers, where r is what a scalar head says of the last
    token of a conversation (Bradley & Terry, 1952; Ouyang et al., 2022).

    The model is left as a sequence classifier with one label, with which ``search.scorer/reward_model`` scores.
    """

    scalar: ClassVar[bool] = True

    def worth(self, model: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
        rewards: Tensor = model.head(hidden).squeeze(-1)
        last = torch.ones_like(batch.documents, dtype=torch.bool)
        last[:, :-1] = batch.documents[:, 1:] != batch.documents[:, :-1]
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32)) * last

    def pair_loss(self, pairs: Pairs, batch: Batch) -> Tensor:
        return -F.logsigmoid(pairs.chosen - pairs.rejected)

    @classmethod
    def trained(cls, decoder: Decoder) -> Any:
        row = decoder.head.weight[:1].detach().clone()
        decoder.give_scalar_head(seed=0)
        decoder.head.weight.data = row
        return decoder

    @classmethod
    def example(cls) -> Example:
        # The head reads the first number of each hidden state: 2 at the end of the chosen conversation, and at the end
        # of the other one 2 - log 3, so that the odds are 3.
        scores = [[7.0, 0.0], [-7.0, 1.0], [2.0, 0.0], [7.0, 1.0], [2.0 - math.log(3), 5.0]]
        return Example(cls(), scores, [0, 1, IGNORE, 1, IGNORE], math.log(4 / 3), [0, 0, 0, 1, 1])
