"""1F1B with a flush: one forward, one backward."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "1f1b", papers=[6])
class OneForwardOneBackward(PipelineSchedule):
    """After p-1-d forwards, device d alternates one forward and one backward, and ends with p-1-d backwards.

    The order is the steady state of PipeDream; a flush at the end of the step, which makes it synchronous
    (PipeDream-Flush, the default schedule of Megatron-LM), takes the place of PipeDream's weight versions. It idles as
    long as GPipe, but device d never holds more than p-d microbatches.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        orders = tuple(_order(stage, devices - 1 - stage, microbatches) for stage in range(devices))
        return Schedule(looped(devices), orders, microbatches)


def _order(stage: int, warmup: int, microbatches: int) -> tuple[Task, ...]:
    order = [Task(Kind.F, stage, microbatch) for microbatch in range(min(warmup, microbatches))]
    for microbatch in range(microbatches):
        if warmup + microbatch < microbatches:
            order.append(Task(Kind.F, stage, warmup + microbatch))
        order.append(Task(Kind.B, stage, microbatch))
    return tuple(order)
