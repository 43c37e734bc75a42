"""Exponential moving average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from penstock.policy import policy
from penstock.train.averages.contract import Average


@policy("train.average", "ema", papers=[262])
class ExponentialMovingAverage(Average):
    """Averages with weight (1 - decay) decay^(n - i) on the i-th of n iterates, the rest on the initial weights.

    Butterfly Effects of SGD Noise finds such an average to damp the minibatch noise that autoregressive roll-outs
    amplify. Our reading adds ``warmup``: the decay is at most (1 + n) / (10 + n), so that an early average is not
    dominated by the initial weights.
    """

    decay: float = Field(0.999, ge=0, lt=1)
    warmup: bool = True

    def decay_at(self, count: int) -> float:
        """The decay that update number ``count`` uses."""
        return min(self.decay, (1 + count) / (10 + count)) if self.warmup else self.decay

    def update(self, averages: Sequence[Tensor], weights: Sequence[Tensor], count: int) -> None:
        torch._foreach_lerp_(list(averages), list(weights), 1 - self.decay_at(count))

    @classmethod
    def example(cls) -> tuple[Self, list[float], list[float]]:
        # The decays are 2/11, 3/12, which is the highest, and that again.
        return cls(decay=0.25), [11.0, 0.0, 10.0, 4.0], [2.0, 8.0, 5.0]
