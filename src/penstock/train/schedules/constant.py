"""The same rate throughout."""

from __future__ import annotations

from typing import Self

from penstock.policy import policy
from penstock.train.schedules.contract import Schedule


@policy("train.schedule", "constant")
class Constant(Schedule):
    """The full rate from the end of the warm-up to the end of the run: for runs that are decayed later, in a branch."""

    def shape(self, step: int, total: float) -> float:
        return 1.0

    @classmethod
    def example(cls) -> tuple[Self, list[float]]:
        return cls(warmup_steps=1), [0.5, 1.0, 1.0, 1.0, 1.0]
