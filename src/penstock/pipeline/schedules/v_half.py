"""V-Half: half of 1F1B's memory, for half of its bubble."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Schedule
from penstock.pipeline.ordering.building_block import repeat, v_shaped_block
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "v_half", papers=[21])
class VHalf(PipelineSchedule):
    """Passes go down the devices in two units each and up in one: half of 1F1B's memory.

    Each device holds at most 2 floor((p+2)/2) activations of its two stages, each half as large as 1F1B's. The bubble
    is about half of 1F1B's at equal times.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        return repeat(v_shaped_block(devices, (2, 1, 2, 1)), microbatches)
