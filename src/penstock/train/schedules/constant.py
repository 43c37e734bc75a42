"""The same rate throughout."""

from __future__ import annotations

from penstock.policy import policy
from penstock.train.schedules.contract import Schedule


@policy("train.schedule", "constant")
class Constant(Schedule):
    """The full rate from the end of the warm-up to the end of the run: for runs that are decayed later, in a branch."""

    def shape(self, step: int, total: float) -> float:
        return 1.0
