"""ZB-H2: no bubble, for twice the memory of 1F1B."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Schedule, looped
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.schedules.zb_h1 import split_order
from penstock.policy import policy


@policy("pipeline.schedule", "zb_h2", papers=[3])
class ZeroBubbleH2(PipelineSchedule):
    """ZB-H1 with twice the warm-up and twice the delay: no device idles between its first task and its last.

    Device d starts with 2(p-1-d) forwards and delays W by 2d microbatches; each holds at most 2p-1 microbatches. The
    bubble is (p-1)(F+I-2W), for a W no longer than F and I and m >= 2p-1: none at equal times. So the paper counts,
    within each device's own span. The spans are staggered by a forward each, which needs an optimizer step that waits
    for nobody.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        orders = (split_order(d, 2 * (devices - 1 - d), 2 * d, microbatches) for d in range(devices))
        return Schedule(looped(devices), tuple(orders), microbatches)
