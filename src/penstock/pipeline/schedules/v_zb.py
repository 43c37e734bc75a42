"""V-ZB: no bubble within the memory of 1F1B."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Schedule
from penstock.pipeline.ordering.building_block import repeat, v_shaped_block
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "v_zb", papers=[3, 21])
class VZeroBubble(PipelineSchedule):
    """Passes take four units a device down and two up: the memory of 1F1B, on every device alike, and no bubble.

    Each device holds at most 2p activations of its two stages, each half as large as 1F1B's. At equal times and with
    m >= 2p no device idles between its first task and its last, as in the zero-bubble paper's ZB-V. The pace is twice
    that of V-Half; that it is the authors' choice is our reading, that it has these figures is tested.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        return repeat(v_shaped_block(devices, (4, 2, 4, 2)), microbatches)
