"""The contract ``train.schedule``."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from penstock.policy import Policy, contract, unwritten


@contract(
    "train.schedule",
    law="a pure function of step and total within [0, 1]; the warm-up a straight line to 1 that does not depend on the "
    "total; over one run equal to the factors that the policy gives, worked out by hand",
)
class Schedule(Policy):
    """A learning-rate schedule: the factor on every group's peak rate.

    ``warmup_steps`` rise linearly before the schedule proper, in all policies alike; they count steps, not a share of
    the run, so that runs of different length can share their beginning.

    A policy gives :meth:`shape`, and :meth:`example` for its law.
    """

    warmup_steps: int = Field(0, ge=0)

    def factor(self, step: int, total: float) -> float:
        """The factor for update number ``step`` (from 0) of a run of ``total`` updates.

        Update s of the warm-up has the factor (s + 1) / (warmup_steps + 1); after it, :meth:`shape` is asked. ``total``
        may be an estimate that changes from step to step (runs with a time budget).
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.shape(step, total)

    def shape(self, step: int, total: float) -> float:
        """The factor after the warm-up, between 0 and 1."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> tuple[Self, list[float]]:
        """A schedule of this kind, and its factors at the steps 0, 1, ..., T of a run of T >= 3 updates.

        Work them out by hand, or take them from the paper: the law holds the code against them.
        """
        raise unwritten(cls, "example()", "return a schedule, and its factors at steps 0 to T of a run of T updates")
