"""The contract ``train.schedule``."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from penstock.policy import Policy, contract, unwritten


@contract(
    "train.schedule",
    law="a pure function of step and total within [0, 1]; the warm-up a straight line to 1 that does not depend on the "
    "total; over one run equal to the factors that the policy gives, worked out by hand, and a longer run is that one "
    "drawn out",
)
class Schedule(Policy):
    """A learning-rate schedule: the factor on every group's peak rate.

    A warm-up rises linearly before the schedule proper, in all policies alike. ``warmup`` is its share of the run,
    which suits a run of any length; ``warmup_steps`` counts updates, so that runs of different length can share their
    beginning. One of them is given.

    A policy gives :meth:`shape`, and :meth:`example` for its law; :meth:`drawn_out` where options of its own count
    updates.
    """

    warmup: float = Field(0.0, ge=0, lt=1)
    warmup_steps: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.warmup and self.warmup_steps:
            raise ValueError("give either warmup, a share of the run, or warmup_steps, not both")
        return self

    def warmup_updates(self, total: float) -> int:
        """The updates of the warm-up in a run of ``total``."""
        return round(self.warmup * total) if self.warmup else self.warmup_steps

    def factor(self, step: int, total: float) -> float:
        """The factor for update number ``step`` (from 0) of a run of ``total`` updates.

        Update s of the warm-up of w updates has the factor (s + 1) / (w + 1); after it, :meth:`shape` is asked.
        ``total`` may be an estimate that changes from step to step (runs with a time budget).
        """
        if self.warmup:
            counted = {"warmup": 0.0, "warmup_steps": self.warmup_updates(total)}
            return self.model_copy(update=counted).factor(step, total)
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.shape(step, total)

    def shape(self, step: int, total: float) -> float:
        """The factor after the warm-up of ``warmup_steps``, between 0 and 1."""
        raise NotImplementedError

    def drawn_out(self, times: int) -> Self:
        """The schedule that has, in a run of ``times`` as many updates, the shape of this one: options that count
        updates are multiplied. A policy that has some besides ``warmup_steps`` says so here."""
        return self.model_copy(update={"warmup_steps": times * self.warmup_steps})

    @classmethod
    def example(cls) -> tuple[Self, list[float]]:
        """A schedule of this kind, and its factors at the steps 0, 1, ..., T of a run of T >= 3 updates.

        Work them out by hand, or take them from the paper: the law holds the code against them.
        """
        raise unwritten(cls, "example()", "return a schedule, and its factors at steps 0 to T of a run of T updates")
