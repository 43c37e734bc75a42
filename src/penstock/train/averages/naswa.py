"""Mean of the iterates that differ enough from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from penstock.policy import policy
from penstock.train.averages.contract import Average


@policy("train.average", "naswa", papers=[64])
class NormFilteredAverage(Average):
    """Like ``aswa``, but an iterate w counts only where its distance from the average a says something new.

    On Model Stability as a Function of Random Seed: a filter on |w - a| keeps iterates that are near the average from
    holding it back. The authors compare the distance with the mean of the distances since the last accepted iterate.
    Ours is a reading without such memory: w counts if |w - a| > ``threshold`` |a|, l2 norms over all weights together;
    else a itself stands in for it, and the average stays. With ``threshold`` 0 it equals ``aswa``.
    """

    elementwise: ClassVar[bool] = False

    threshold: NonNegativeFloat = 0.01

    def update(self, averages: Sequence[Tensor], weights: Sequence[Tensor], count: int) -> None:
        averages = list(averages)
        change = torch._foreach_sub(list(weights), averages)
        distance, size = torch.nn.utils.get_total_norm(change), torch.nn.utils.get_total_norm(averages)
        # A tensor rather than an if: nothing waits for the device.
        share = (distance > self.threshold * size).to(distance.dtype) / count
        torch._foreach_mul_(change, share)
        torch._foreach_add_(averages, change)

    @classmethod
    def example(cls) -> tuple[Self, list[float], list[float]]:
        # 9 is near 8, which counts twice; 2 is not.
        return cls(threshold=0.5), [4.0, 8.0, 9.0, 2.0], [8.0, 8.0, 6.0]
