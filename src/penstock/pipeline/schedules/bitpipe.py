"""BitPipe: two V-shaped pipelines in opposite directions."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import Schedule, mirrored, zigzag
from penstock.pipeline.ordering.list_scheduling import improved
from penstock.pipeline.schedules.chimera import check_even
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "bitpipe", papers=[0])
class BitPipe(PipelineSchedule):
    """Chimera's two directions, each over V-shaped chunks.

    Device d holds stages d and 2p-1-d of one copy of the model, p-1-d and p+d of the other. Bubbles are smaller than
    those of interleaved 1F1B and of Chimera for a unit of p microbatches, for two copies of the weights on all devices
    together. Even p only. The order is ours: units of p microbatches in a row or, where it is faster, a block that is
    repeated without bubbles, and a local search from both, at F = 1 and B = 2; on 8 devices with 8, 16 and 32
    microbatches it takes no longer than that of the authors' program. The eager exchange of gradients, as soon as a
    stage's last backward is done, is the runtime's.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        check_even("bitpipe", devices, microbatches)
        replicas = tuple(microbatch % 2 for microbatch in range(devices))
        return improved(mirrored(zigzag(devices, 2), devices), devices, replicas, microbatches)
