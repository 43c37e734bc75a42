"""The contract of paths through a pipeline."""

from __future__ import annotations

from typing import ClassVar, Self

from penstock.pipeline.ir.refusal import check_size
from penstock.pipeline.ir.schedule import Schedule, looped
from penstock.pipeline.ordering.list_scheduling import list_schedule
from penstock.policy import Policy, contract, unwritten


@contract(
    "pipeline.route",
    law="every path has as many stages as the policy says, none twice; stages that only some microbatches pass serve "
    "equally many, to within two; for one pair of numbers the paths that the policy gives, worked out by hand; a stage "
    "that can be made anew is so from those that take its place on other paths, or from those next to it where none "
    "does; the schedule is complete along the paths and free of deadlock, its simulation equal to a count by brute "
    "force; updates of the trainer on several processes equal to those of one device along the same paths",
)
class PipelineRoute(Policy):
    """Sends microbatches through a pipeline of one stage a device on paths of their own: partial, or in another order.

    The model that is trained so is another one than with full paths: layers learn to do without their neighbours, or in
    another order.

    A policy gives :meth:`paths`, :meth:`length` where it is not the number of stages, and :meth:`example` for its law;
    :meth:`neighbours` where a stage that is lost can be made anew from others.

    Attributes:
        recovers: whether it can.
    """

    recovers: ClassVar[bool] = False

    def build(self, devices: int, microbatches: int) -> Schedule:
        """The schedule along the paths: a device runs, of what has arrived, backwards first.

        Raises:
            UsageError: a number is not positive.
            RefusalError: there are no such paths for these numbers; it names the smallest change that would work.
        """
        check_size(devices, microbatches)
        paths = self.paths(devices, microbatches)
        return list_schedule(looped(devices), devices, [0] * microbatches, paths)

    def length(self, stages: int) -> int:
        """The number of stages on each path."""
        return stages

    def paths(self, stages: int, microbatches: int) -> tuple[tuple[int, ...], ...]:
        """What a policy gives: for each microbatch the stages that it passes, in order."""
        raise NotImplementedError

    def neighbours(self, stage: int, stages: int) -> tuple[int, ...]:
        """What a policy that :attr:`recovers` gives: the stages that a lost ``stage`` is averaged from. These stand in
        its place on other paths; where none does, they are those next to it."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> tuple[Self, int, tuple[tuple[int, ...], ...]]:
        """Paths of this kind, a number of stages, and the path of each of some microbatches through them.

        Work them out by hand, or take them from the paper: the law holds the code against them.
        """
        raise unwritten(cls, "example()", "return a route, a number of stages, and the paths of some microbatches")
