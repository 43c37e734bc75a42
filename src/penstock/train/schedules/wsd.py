"""Warm-up, stable, decay."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field

from penstock.policy import policy
from penstock.train.schedules.contract import Schedule


@policy("train.schedule", "wsd", papers=[227])
class WarmupStableDecay(Schedule):
    """The full rate until the last ``decay`` of the run, then an exponential decay to ``floor`` at its end (MiniCPM).

    Until the decay starts nothing depends on the length of the run. So a long run's checkpoint of the stable phase may
    be resumed with a smaller total, and equals the uninterrupted shorter run: one long run with branches serves all
    lengths. The paper anneals by halves, 0.5 ** ((s - S) / h) from update S on, and finds a tenth of the tokens enough
    for it. That we state the factor at the end rather than the half-life h is our reading: here
    h = decay T / log2(1 / floor).
    """

    decay: float = Field(0.1, gt=0, le=1)
    floor: float = Field(0.1, gt=0, le=1)

    def decay_start(self, total: float) -> float:
        """The updates before the decay in a run of ``total``; a run may branch off at any of them."""
        return (1 - self.decay) * total

    def shape(self, step: int, total: float) -> float:
        done = (step - self.decay_start(total)) / (self.decay * total)
        return math.pow(self.floor, min(1.0, max(0.0, done)))

    @classmethod
    def example(cls) -> tuple[Self, list[float]]:
        # 1/16 over half of the run: a half for each update.
        return cls(decay=0.5, floor=0.0625), [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]
