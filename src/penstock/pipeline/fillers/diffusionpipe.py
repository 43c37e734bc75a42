"""DiffusionPipe: frozen encoders run in the bubbles of the backbone's pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from penstock.pipeline.fillers.contract import BubbleFiller, Example, Filler
from penstock.policy import policy


@policy("pipeline.filler", "diffusionpipe", papers=[2])
class DiffusionPipe(BubbleFiller):
    """Fills each bubble greedily with the next layers, and with a part of the batch where a whole layer does not fit.

    A device's part of the batch is cut into ``parts`` equal ones, the smallest that a layer runs for; into a bubble go
    as many parts of the next layer as fit, and then of the layers after it. Layers come in order: a layer begins once
    all parts have passed the one before. The greedy filling, with layers of the next iteration and partial batches, is
    the paper's; that each device fills its own bubbles with its own samples, and one layer at a time, is our reading.
    Its stages come from :func:`penstock.pipeline.partition.diffusionpipe.partition`. Not built: diffusion models, so
    that nothing yet runs in the bubbles.
    """

    parts: int = Field(8, ge=1)

    def pack(self, gaps: Sequence[tuple[float, float]], frozen: Sequence[float]) -> list[Filler]:
        fillers: list[Filler] = []
        layer = done = number = 0  # of the layer, the parts that have passed it
        for start, end in gaps:
            while layer < len(frozen):
                each = frozen[layer] / self.parts
                room = self.parts if start + each * self.parts <= end else int((end - start) / each)
                count = min(room, self.parts - done)
                if not count:
                    break
                after = start + count * each
                fillers.append(Filler(layer, number, count / self.parts, start, after))
                start, done, number = after, done + count, number + 1
                if done == self.parts:
                    layer, done, number = layer + 1, 0, 0
        return fillers

    @classmethod
    def example(cls) -> Example:
        # A whole layer of two seconds and half of the next one fit into three; its other half follows the last task.
        packed = [Filler(0, 0, 1, 1, 3), Filler(1, 0, 0.5, 3, 4), Filler(1, 1, 0.5, 6, 7)]
        return Example(cls(parts=4), [(1, 4), (6, float("inf"))], [2, 2], packed)
