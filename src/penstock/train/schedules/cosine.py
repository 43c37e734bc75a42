"""Cosine decay."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field

from penstock.policy import policy
from penstock.train.schedules.contract import Schedule


@policy("train.schedule", "cosine")
class CosineDecay(Schedule):
    """Half a cosine from 1 at the end of the warm-up to ``floor`` at the end of the run (Loshchilov & Hutter, 2017).

    With T updates and p = (t - warmup_steps) / (T - warmup_steps), the factor is
    ``floor + (1 - floor) (1 + cos(pi p)) / 2``; the last update, t = T - 1, is still just above ``floor``.
    """

    floor: float = Field(0.1, ge=0, le=1)

    def shape(self, step: int, total: float) -> float:
        decaying = total - self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / decaying) if decaying > 0 else 1.0
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2

    @classmethod
    def example(cls) -> tuple[Self, list[float]]:
        # Three steps of the warm-up, then half a cosine over six updates: 0, 30, ..., 180 degrees.
        high, low = (2 + math.sqrt(3)) / 4, (2 - math.sqrt(3)) / 4
        shape = [1.0, high, 0.75, 0.5, 0.25, low, 0.0]
        return cls(floor=0.2, warmup_steps=3), [0.25, 0.5, 0.75, *(0.2 + 0.8 * factor for factor in shape)]
