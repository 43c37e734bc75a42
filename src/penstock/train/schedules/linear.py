"""Linear decay to zero."""

from __future__ import annotations

from typing import Self

from penstock.policy import policy
from penstock.train.schedules.contract import Schedule


@policy("train.schedule", "linear", papers=[385])
class LinearDecay(Schedule):
    """1 - t/T: the worst-case optimal schedule for the last iterate (When, Why and How Much?, the unrefined result).

    T counts updates from the first; the last update, t = T - 1, still has the rate 1/T.
    """

    def shape(self, step: int, total: float) -> float:
        return min(1.0, max(0.0, 1 - step / total))

    @classmethod
    def example(cls) -> tuple[Self, list[float]]:
        return cls(warmup_steps=1), [0.5, 0.75, 0.5, 0.25, 0.0]
