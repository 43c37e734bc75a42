"""CheckFree+: half of the microbatches take the stages at both ends in swapped order."""

from __future__ import annotations

from typing import Self

from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.routes.contract import PipelineRoute
from penstock.policy import policy


@policy("pipeline.route", "checkfree", papers=[84])
class CheckFree(PipelineRoute):
    """Odd microbatches pass the first two stages, and the last two, the other way round.

    So the second stage learns to do what the first does, and the one before the last what the last does: either end,
    when its device is lost, is recovered as a copy of its neighbour. Embedding and head belong to no stage of this
    order; the paper copies them to the neighbours. That it is the odd ones is our reading. Not built: training along
    these paths, and the recovery of a lost stage, from its neighbours' average or as a copy.
    """

    def paths(self, stages: int, microbatches: int) -> tuple[tuple[int, ...], ...]:
        if stages < 4:
            raise RefusalError(
                f"checkfree swaps two stages at each end: it needs four stages, not {stages}",
                devices=4,
                microbatches=microbatches,
            )
        straight = tuple(range(stages))
        swapped = (1, 0, *straight[2:-2], stages - 1, stages - 2)
        return tuple(swapped if microbatch % 2 else straight for microbatch in range(microbatches))

    @classmethod
    def example(cls) -> tuple[Self, int, tuple[tuple[int, ...], ...]]:
        straight, swapped = (0, 1, 2, 3, 4, 5), (1, 0, 2, 3, 5, 4)
        return cls(), 6, (straight, swapped, straight)
