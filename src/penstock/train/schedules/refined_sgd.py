"""The refined schedule for SGD."""

from __future__ import annotations

from typing import ClassVar, Self

from penstock.policy import policy
from penstock.train.schedules.refined import Refinement


@policy("train.schedule", "refined_sgd", papers=[385])
class RefinedForSGD(Refinement):
    """Refined for SGD: weights are inverse squares of the gradients' l2 norms."""

    metric: ClassVar[str] = "grad_norm"
    power: ClassVar[float] = 2.0

    @classmethod
    def example(cls) -> tuple[Self, list[float]]:
        # The weights are 1/16, 1/4, 1 and 1; their products with the sums of those after them 9/64, 1/2, 1 and 0.
        return cls(norms=(4.0, 2.0, 1.0)), [0.140625, 0.5, 1.0, 0.0]
