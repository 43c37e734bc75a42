"""Choosing tokens with bits that do not depend on the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from penstock.serve.choose.logprobs import Logprobs
from penstock.serve.choose.sampler import Sampler


class InvariantSampler(Sampler):
    """Draws, and looks up log-probabilities, for one row after the other: libraries may compute the last numbers of a
    tensor by other instructions than the rest, and where those are depends on how many rows it has."""

    def _drawn(self, scores: Tensor, draws: np.ndarray) -> Tensor:
        alone = [slice(row, row + 1) for row in range(len(scores))]
        return torch.cat([super(InvariantSampler, self)._drawn(scores[one], draws[:, one]) for one in alone])

    def _told(self, logits: Tensor, tokens: Tensor, most: int, spread: Tensor | None) -> Logprobs:
        alone = [slice(row, row + 1) for row in range(len(logits))]
        told = super()._told
        return Logprobs.joined(
            [told(logits[one], tokens[one], most, None if spread is None else spread[one]) for one in alone]
        )
