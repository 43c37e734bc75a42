"""Arithmetic mean of all iterates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from penstock.policy import policy
from penstock.train.averages.contract import Average


@policy("train.average", "aswa", papers=[64])
class AggressiveAverage(Average):
    """The mean of the weights after every update from the first on; the initial weights are not part of it.

    On Model Stability as a Function of Random Seed: averaging aggressively, at each batch rather than at each epoch
    late in training, makes models of different seeds agree better.
    """

    def update(self, averages: Sequence[Tensor], weights: Sequence[Tensor], count: int) -> None:
        torch._foreach_lerp_(list(averages), list(weights), 1 / count)

    @classmethod
    def example(cls) -> tuple[Self, list[float], list[float]]:
        return cls(), [8.0, 0.0, 3.0, 9.0, 8.0], [0.0, 1.5, 4.0, 5.0]
