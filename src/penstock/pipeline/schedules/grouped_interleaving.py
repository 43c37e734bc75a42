"""Grouped interleaving: interleaved 1F1B in smaller groups of microbatches, for less memory."""

from __future__ import annotations

import math

from pydantic import Field

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "grouped_interleaving", papers=[170])
class GroupedInterleaving(PipelineSchedule):
    """Takes ``group`` microbatches through one of v = ``chunks`` stages of a device before it turns to the next one.

    Interleaved 1F1B has rounds of p microbatches, and twice as many forwards before the first backward as a microbatch
    has hops. Here each device takes an F every three units of time (of F, I and W, which are equal), and I with its W
    between; so a group of p/2 comes back to device 0 in time, and a hop costs one forward. The memory is about half as
    large, for a longer cool-down. By default the group is half of p, rounded up. Of smaller groups, as many are under
    way as make up for it. The block is that of PipeOffload's program ("generalized interleaving"), where it is one half
    of the schedule; offload and recomputation are its other half, and the transform ``pipeoffload`` is ours.
    """

    chunks: int = Field(2, ge=2)
    group: int | None = Field(None, ge=1)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        orders = tuple(self._order(device, devices, microbatches) for device in range(devices))
        return Schedule(looped(devices, self.chunks), orders, microbatches)

    def _order(self, device: int, devices: int, microbatches: int) -> tuple[Task, ...]:
        """A device's tasks by the time at which the block has them, in units."""
        v, half = self.chunks, -(-devices // 2)
        size = self.group or half
        ahead = -(-half // size)  # groups between a group's F of one chunk and of the next
        shared = v // math.gcd(v, ahead)  # chunks after which another group's turn would come at the same time

        def after(chunk: int) -> int:
            """Units between a group's first and its later chunks."""
            return 3 * size * (ahead * chunk + chunk // shared)

        hops = devices - 1 - device
        backward = device + after(v - 1) + 3 * hops + 1  # when the first I comes
        timed = []
        for microbatch in range(microbatches):
            group, within = divmod(microbatch, size)
            begin = 3 * size * v * group + 3 * within
            for chunk in range(v):
                stage = chunk * devices + device
                timed.append((device + begin + after(chunk), Task(Kind.F, stage, microbatch)))
                timed.append((backward + begin + after(v - 1 - chunk), Task(Kind.I, stage, microbatch)))
        order: list[Task] = []
        for _, task in sorted(timed):
            order += [task, task._replace(kind=Kind.W)] if task.kind is Kind.I else [task]
        return tuple(order)
