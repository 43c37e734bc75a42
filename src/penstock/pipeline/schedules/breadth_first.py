"""Breadth-first: every microbatch through one chunk before the next."""

from __future__ import annotations

from pydantic import Field

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "breadth_first", papers=[27])
class BreadthFirst(PipelineSchedule):
    """Runs all microbatches through one of its ``chunks`` stages before it turns to the next one.

    So the weights of a fully sharded stage are gathered once for the forward and once for the backward, and its
    gradients reduced once, whatever m is. With m >= p, the bubble is (p-1)/v as in interleaved 1F1B; all activations of
    the step are held at its turning point. The backwards run in the order of the forwards: our reading, it changes no
    figure.
    """

    chunks: int = Field(2, ge=1)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        chunks = range(self.chunks)
        orders = tuple(
            tuple(
                Task(kind, chunk * devices + device, microbatch)
                for kind, visits in ((Kind.F, chunks), (Kind.B, chunks[::-1]))
                for chunk in visits
                for microbatch in range(microbatches)
            )
            for device in range(devices)
        )
        return Schedule(looped(devices, self.chunks), orders, microbatches)
