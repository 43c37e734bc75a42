"""Hanayo: microbatches run as waves back and forth over the devices."""

from __future__ import annotations

from pydantic import Field

from penstock.pipeline.ir.schedule import Schedule, zigzag
from penstock.pipeline.ordering.list_scheduling import improved
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "hanayo", papers=[7])
class Hanayo(PipelineSchedule):
    """Each of ``waves`` waves is a V: down the devices and back up, 2p stages, with one copy of the model.

    Bubbles shrink as waves grow, for more transfers; each device holds about the activations of p microbatches, as
    1F1B's first does. The zigzag placement and units of p microbatches are the paper's. The order within a unit is
    ours, as are, for more microbatches, a block that is repeated without bubbles where it is faster than units in a
    row, and the local search from both, at F = 1 and B = 2.
    """

    waves: int = Field(2, ge=1)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        return improved(zigzag(devices, 2 * self.waves), devices, (0,) * devices, microbatches)
