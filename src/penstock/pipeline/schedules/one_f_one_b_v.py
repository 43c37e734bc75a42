"""1F1B-V: 1F1B over a V, for two thirds of its memory."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Schedule, zigzag
from penstock.pipeline.ordering.periodic import periodic
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "1f1b_v", papers=[21])
class OneForwardOneBackwardV(PipelineSchedule):
    """Repeats a V-shaped building block with whole backwards, whose passes follow each other as closely as they can.

    The first stage of a device lives long where its second one lives short, so that all devices hold about two thirds
    of what 1F1B's first device does, for the time of 1F1B. The block is the paper's; our way to state it finds the
    peaks of the authors'. How warm-up and cool-down are reordered is ours.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        return periodic(zigzag(devices, 2), microbatches)
