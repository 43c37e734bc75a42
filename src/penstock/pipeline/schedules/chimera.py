"""Chimera: two pipelines in opposite directions."""

from __future__ import annotations

from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Schedule, looped, mirrored
from penstock.pipeline.ordering.list_scheduling import fastest
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "chimera")
class Chimera(PipelineSchedule):
    """Half of the microbatches go down the devices through one copy of the model, half go up through another.

    Li & Hoefler (2021), the baseline of BitPipe and Hanayo. Each device holds two stages' weights, whose gradients the
    copies exchange at the end. With B = 2F, a unit of p microbatches idles for (p-2)/(3p/2+p-2) of its time. Even p
    only, as there. The order within a unit is our reading. Units in a row repeat their bubbles; where it is faster, a
    block without bubbles is repeated in their place, which is ours.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        check_even("chimera", devices, microbatches)
        replicas = tuple(microbatch % 2 for microbatch in range(devices))
        return fastest(mirrored(looped(devices), devices), devices, replicas, microbatches)


def check_even(name: str, devices: int, microbatches: int) -> None:
    """Refuses an odd number of devices.

    Raises:
        RefusalError: p is odd.
    """
    if devices % 2:
        raise RefusalError(
            f"{name} pairs each device with the one opposite: it needs an even number of devices, not {devices}",
            devices=devices + 1,
            microbatches=microbatches,
        )
