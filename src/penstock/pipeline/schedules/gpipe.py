"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "gpipe", papers=[51])
class GPipe(PipelineSchedule):
    """Each stage runs the forward of every microbatch, then the backward of every microbatch.

    The devices idle for (p-1)/(m+p-1) of the step, and each holds the activations of all m microbatches. The paper
    draws the backwards in the reverse order of the forwards; here, as in PyTorch, they run in the same order, which
    changes neither figure. Its re-materialisation is the model's business, not the schedule's.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        orders = tuple(
            tuple(Task(kind, stage, microbatch) for kind in (Kind.F, Kind.B) for microbatch in range(microbatches))
            for stage in range(devices)
        )
        return Schedule(looped(devices), orders, microbatches)
