"""DualPipe: two directions over two copies of the model, whose forwards and backwards run in overlapped pairs."""

from __future__ import annotations

from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Schedule, Task, looped, mirrored
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.schedules.dualpipev import passes
from penstock.policy import policy


@policy("pipeline.schedule", "dualpipe")
class DualPipe(PipelineSchedule):
    """Half of the microbatches go down the devices, half go up through a second copy of the model, as in Chimera.

    From DeepSeek-V3 (2024), in the order of DeepSeek's program. Each device runs F of one direction together with B of
    the other, so that the communication within one hides behind the computation of the other; the simulator's
    ``overlap`` says what that gains. The runtime runs the two of a pair after each other. Even p and m, m >= 2p.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        even = devices + devices % 2
        needed = max(microbatches + microbatches % 2, 2 * even)
        if (even, needed) != (devices, microbatches):
            raise RefusalError(
                f"dualpipe pairs each device with the one opposite, and fills both directions with two microbatches a "
                f"device: it needs an even number of devices, and of microbatches at least twice as many; not "
                f"{devices} and {microbatches}",
                devices=even,
                microbatches=needed,
            )
        overlapped = set()
        orders = []
        for device in range(devices):
            place, far = min(device, devices - 1 - device), device >= devices // 2
            order = []
            for step in passes(devices // 2, place, microbatches // 2):
                direction = step.stream ^ far
                task = Task(
                    step.kind, devices - 1 - device if direction else device, 2 * step.number + direction, direction
                )
                order.append(task)
                if step.overlapped:
                    overlapped.add(task)
            orders.append(tuple(order))
        placement = mirrored(looped(devices), devices)
        return Schedule(placement, tuple(orders), microbatches, overlapped=frozenset(overlapped))
