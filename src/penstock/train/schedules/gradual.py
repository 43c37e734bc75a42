"""Gradual warm-up for large batches."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from penstock.policy import Choice, policy
from penstock.train.schedules.contract import Schedule
from penstock.train.schedules.linear import LinearDecay


@policy("train.schedule", "gradual", papers=[206])
class GradualWarmup(Schedule):
    """Rises from the small batch's rate, 1 / ``growth`` of the peak, and then follows the schedule ``after``.

    Accurate, Large Minibatch SGD: where the batch and with it the rate are k = ``growth`` times larger, training starts
    at the old rate and adds the same amount at each update of the warm-up (five epochs in the paper), so that the
    first, fast-changing phase is not thrown off. Update s has the factor 1/k + (1 - 1/k) s / ``warmup_steps``.
    """

    growth: float = Field(8.0, ge=1, allow_inf_nan=False)
    after: Annotated[Schedule, Choice("train.schedule")] = LinearDecay()

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.after.warmup_steps or self.after.warmup:
            raise ValueError("set warmup or warmup_steps beside 'growth', not in 'after': there is one warm-up")
        return self

    def factor(self, step: int, total: float) -> float:
        if self.warmup:
            return super().factor(step, total)
        if step < self.warmup_steps:
            return 1 / self.growth + (1 - 1 / self.growth) * step / self.warmup_steps
        return self.shape(step, total)

    def shape(self, step: int, total: float) -> float:
        # As if the warm-up were its own: some shapes begin where it ends.
        return self.after.model_copy(update={"warmup_steps": self.warmup_steps}).shape(step, total)

    def drawn_out(self, times: int) -> Self:
        return super().drawn_out(times).model_copy(update={"after": self.after.drawn_out(times)})

    @classmethod
    def example(cls) -> tuple[Self, list[float]]:
        return cls(growth=4, warmup_steps=3), [0.25, 0.5, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
