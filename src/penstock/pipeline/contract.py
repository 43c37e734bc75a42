"""The contracts of pipelines: ``schedule``, ``transform``, ``route`` and ``filler``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from penstock.core.errors import UsageError
from penstock.pipeline.ir import Schedule, WeightRule, looped
from penstock.pipeline.list_scheduling import list_schedule
from penstock.pipeline.simulator import Simulation
from penstock.policy import Policy, contract


class RefusalError(UsageError):
    """A schedule does not exist for these numbers of devices and microbatches.

    ``devices`` and ``microbatches`` are the nearest larger ones for which it does.
    """

    def __init__(self, what: str, *, devices: int, microbatches: int) -> None:
        super().__init__(what, hint=f"It works with {devices} devices and {microbatches} microbatches.")
        self.devices = devices
        self.microbatches = microbatches


@contract(
    "pipeline.schedule",
    law="every task once, consistent with the dependencies, free of deadlock; the simulated peak of live activations "
    "and the version of the weights that each task sees equal to a count by brute force; a refusal names numbers that "
    "work; loss and all gradients on several processes equal to one device in fp64 (without a flush, the weights to "
    "those of the delayed updates); the measured peak of live activations equal to the simulated one",
)
class PipelineSchedule(Policy):
    """Orders the work of one training step on a pipeline of devices.

    Options say how the model is cut (chunks on a device, waves); the number of stages follows from them.
    """

    def build(self, devices: int, microbatches: int) -> Schedule:
        """The schedule of ``microbatches`` m >= 1 on ``devices`` p >= 1.

        Raises:
            UsageError: a number is not positive.
            RefusalError: there is no such schedule for these numbers; it names the smallest change that would work.
        """
        _check_positive(devices, microbatches)
        return self.arrange(devices, microbatches)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        """What a policy gives: the schedule, for numbers that are positive; or it raises :class:`RefusalError`."""
        raise NotImplementedError


def _check_positive(devices: int, microbatches: int) -> None:
    for what, number in (("devices", devices), ("microbatches", microbatches)):
        if number < 1:
            raise UsageError(f"a pipeline of {number} {what} does nothing", hint=f"Ask for one or more {what}.")


@contract(
    "pipeline.transform",
    law="the same forwards and backwards on the same devices, complete and free of deadlock, in no more time at the "
    "times that it was made for; loss and all gradients on several processes equal to one device in fp64",
)
class PipelineTransform(Policy):
    """Makes a better schedule of any schedule with a flush."""

    def apply(self, schedule: Schedule) -> Schedule:
        """The transformed schedule.

        Raises:
            UsageError: it has no flush, or the options do not fit it.
        """
        if schedule.weights is not WeightRule.FLUSH:
            raise UsageError(
                f"{self.policy_name} transforms schedules with one version of the weights; this one stashes several",
                hint="Transform 1f1b, which has the order of pipedream and one update a step.",
            )
        return self.transform(schedule)

    def transform(self, schedule: Schedule) -> Schedule:
        """What a policy gives: the transformed schedule."""
        raise NotImplementedError


@contract(
    "pipeline.route",
    law="every path has as many stages as the policy says, none twice; stages that only some microbatches pass serve "
    "equally many, to within two; the schedule is complete along the paths, and free of deadlock",
)
class PipelineRoute(Policy):
    """Sends microbatches through a pipeline of one stage a device on paths of their own: partial, or in another order.

    The model that is trained so is another one than with full paths: layers learn to do without their neighbours, or in
    another order.
    """

    def build(self, devices: int, microbatches: int) -> Schedule:
        """The schedule along the paths: a device runs, of what has arrived, backwards first.

        Raises:
            UsageError: a number is not positive.
            RefusalError: there are no such paths for these numbers; it names the smallest change that would work.
        """
        _check_positive(devices, microbatches)
        paths = self.paths(devices, microbatches)
        return list_schedule(looped(devices), devices, [0] * microbatches, paths)

    def length(self, stages: int) -> int:
        """The number of stages on each path."""
        return stages

    def paths(self, stages: int, microbatches: int) -> tuple[tuple[int, ...], ...]:
        """What a policy gives: for each microbatch the stages that it passes, in order."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Filler:
    """Work in a bubble: a ``share`` of a device's samples of the next batch through frozen ``layer``.

    ``part`` numbers the shares of a device in the order in which they were cut off the batch; ``start`` and ``end`` are
    seconds of the simulation.
    """

    layer: int
    part: int
    share: float
    start: float
    end: float


@contract(
    "pipeline.filler",
    law="every sample passes every frozen layer once and in order; no two tasks of a device overlap and none of the "
    "pipeline's moves; idle time within the step falls by exactly the work that was put there",
)
class BubbleFiller(Policy):
    """Puts the frozen part of a model, such as a text encoder, to work where a pipeline's devices idle.

    Nothing waits for it in the same step: it prepares the inputs of the next one. Each device encodes its own equal
    part of the next batch, as in data parallelism.
    """

    def fill(self, simulation: Simulation, frozen: Sequence[float]) -> list[list[Filler]]:
        """For each device its fillers in order of time; what finds no bubble follows the device's last task.

        Args:
            simulation: a step of the trained part.
            frozen: seconds of each frozen layer for a device's whole part of the batch.

        Raises:
            UsageError: a layer takes less than no time.
        """
        for layer, seconds in enumerate(frozen):
            if not 0 <= seconds < float("inf"):
                raise UsageError(f"a frozen layer takes 0 seconds or more, and layer {layer} takes {seconds}")
        ends = (ends[-1] if ends else 0.0 for ends in simulation.ends)
        return [
            self.pack([*gaps, (end, float("inf"))], frozen) for gaps, end in zip(simulation.gaps, ends, strict=True)
        ]

    def pack(self, gaps: Sequence[tuple[float, float]], frozen: Sequence[float]) -> list[Filler]:
        """What a policy gives: all work of one device, in its ``gaps``, pairs (start, end); the last has no end."""
        raise NotImplementedError
