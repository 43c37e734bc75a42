"""BitPipe: two V-shaped pipelines in opposite directions."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Schedule, zigzag
from penstock.pipeline.schedules.chimera import bidirectional
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "bitpipe", papers=[0])
class BitPipe(PipelineSchedule):
    """Chimera's two directions, each over V-shaped chunks.

    Device d holds stages d and 2p-1-d of one copy of the model, p-1-d and p+d of the other. Bubbles are smaller than
    those of interleaved 1F1B and of Chimera for a unit of p microbatches, for two copies of the weights on all devices
    together. Even p only. The order within a unit is our reading. The eager exchange of gradients, as soon as a stage's
    last backward is done, is the runtime's.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        return bidirectional("bitpipe", zigzag(devices, 2), devices, microbatches)
