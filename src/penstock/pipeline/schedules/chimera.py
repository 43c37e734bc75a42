"""Chimera: two pipelines in opposite directions."""

from __future__ import annotations

from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Placement, Schedule, looped, mirrored
from penstock.pipeline.ordering.list_scheduling import fastest
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "chimera")
class Chimera(PipelineSchedule):
    """Half of the microbatches go down the devices through one copy of the model, half go up through another.

    Li & Hoefler (2021), the baseline of BitPipe and Hanayo. Each device holds two stages' weights, whose gradients the
    copies exchange at the end. With B = 2F, a unit of p microbatches idles for (p-2)/(3p/2+p-2) of its time. Even p
    only, as there. The order within a unit is our reading.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        return bidirectional("chimera", looped(devices), devices, microbatches)


def bidirectional(name: str, placement: Placement, devices: int, microbatches: int) -> Schedule:
    """Odd microbatches take ``placement`` mirrored, from the last device to the first.

    Raises:
        RefusalError: p is odd.
    """
    if devices % 2:
        raise RefusalError(
            f"{name} pairs each device with the one opposite: it needs an even number of devices, not {devices}",
            devices=devices + 1,
            microbatches=microbatches,
        )
    replicas = [microbatch % 2 for microbatch in range(devices)]
    return fastest(mirrored(placement, devices), devices, replicas, microbatches)
