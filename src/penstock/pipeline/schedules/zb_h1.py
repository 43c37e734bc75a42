"""ZB-H1: zero-bubble scheduling within the memory of 1F1B."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "zb_h1", papers=[3])
class ZeroBubbleH1(PipelineSchedule):
    """1F1B with the backward split: I runs at once, W as many microbatches later as the device is far down the pipe.

    Device d starts with p-1-d forwards and delays W by d microbatches, so each holds at most p microbatches from F to
    W, and W fills what were bubbles: of 1F1B's (p-1)(F+I+W) there remain (p-1)(F+I-W), a third at equal times. That is
    the paper's count, for a W no longer than F and I, and m >= p.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        orders = (split_order(d, devices - 1 - d, d, microbatches) for d in range(devices))
        return Schedule(looped(devices), tuple(orders), microbatches)


def split_order(stage: int, warmup: int, delay: int, microbatches: int) -> tuple[Task, ...]:
    """``warmup`` forwards; F and I in turns, from the I number ``delay`` on each with a W; then the W that are left."""
    order = [Task(Kind.F, stage, microbatch) for microbatch in range(min(warmup, microbatches))]
    for microbatch in range(microbatches):
        if warmup + microbatch < microbatches:
            order.append(Task(Kind.F, stage, warmup + microbatch))
        order.append(Task(Kind.I, stage, microbatch))
        if microbatch >= delay:
            order.append(Task(Kind.W, stage, microbatch - delay))
    order += [Task(Kind.W, stage, microbatch) for microbatch in range(max(0, microbatches - delay), microbatches)]
    return tuple(order)
