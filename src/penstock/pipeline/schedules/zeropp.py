"""ZeroPP: breadth-first in units of microbatches, with weight gradients where units meet."""

from __future__ import annotations

from pydantic import Field

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "zeropp", papers=[26])
class ZeroPP(PipelineSchedule):
    """Runs units of microbatches breadth-first, and lets W fill what is idle where units meet.

    A unit of ``unit`` microbatches, p by default, runs F of each of the ``chunks`` stages of a device, then I of each
    in reverse, then W. So a fully sharded stage is gathered twice and reduced once a unit. Larger units communicate
    less and hold more: a device holds the activations of a unit and those of W put off. Device d leaves 2(p-1-d) W of a
    unit until the F of the next one are done. There they fill the wait for the first I, and without them each device is
    free for the next unit just when its first F arrives. Thus, at equal times and with units of at least p microbatches
    and 2(p-1) W on a device, no device idles but in the first unit, for 2(p-1-d) I of one stage.

    Units, blockwise order and the staggering of F, I and W are the paper's; how many W are put off is our derivation.
    """

    chunks: int = Field(2, ge=1)
    unit: int | None = Field(None, ge=1)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        size = self.unit or devices
        units = [range(first, min(first + size, microbatches)) for first in range(0, microbatches, size)]
        orders = tuple(self._order(device, devices, units) for device in range(devices))
        return Schedule(looped(devices, self.chunks), orders, microbatches)

    def _order(self, device: int, devices: int, units: list[range]) -> tuple[Task, ...]:
        stages = range(device, devices * self.chunks, devices)
        order: list[Task] = []
        put_off: list[Task] = []
        for unit in units:
            order += [Task(Kind.F, stage, microbatch) for stage in stages for microbatch in unit]
            order += put_off
            back = [Task(Kind.I, stage, microbatch) for stage in reversed(stages) for microbatch in unit]
            late = [task._replace(kind=Kind.W) for task in back]
            now = max(0, len(late) - 2 * (devices - 1 - device)) if unit is not units[-1] else len(late)
            order += back + late[:now]
            put_off = late[now:]
        return tuple(order)
