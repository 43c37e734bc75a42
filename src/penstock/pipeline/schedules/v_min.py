"""V-Min: the least memory that a V-shaped building block can have."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Schedule
from penstock.pipeline.ordering.building_block import repeat, v_shaped_block
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "v_min", papers=[21])
class VMin(PipelineSchedule):
    """Passes go from device to device at once, so that lifespans are shortest: a third of 1F1B's memory.

    Each device holds at most 2 floor((p+4)/3) activations of its two stages, each half as large as 1F1B's. The bubble
    is about two thirds of 1F1B's at equal times of F, I and W, and grows with m where they differ.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        return repeat(v_shaped_block(devices, (1, 1, 1, 1)), microbatches)
