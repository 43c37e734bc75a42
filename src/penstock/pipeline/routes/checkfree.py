"""CheckFree+: half of the microbatches take the stages at both ends in swapped order."""

from __future__ import annotations

from typing import ClassVar, Self

from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.routes.contract import PipelineRoute
from penstock.policy import policy


@policy("pipeline.route", "checkfree", papers=[84])
class CheckFree(PipelineRoute):
    """Odd microbatches pass the first two stages, and the last two, the other way round.

    So the second stage learns to do what the first does, and the one before the last what the last does. Each of these
    four, when its device is lost, is made anew as a copy of the one that it swaps with; any other stage as the average
    of its two neighbours, weighted by the norms of their last gradients (as in the authors' program). Embedding and
    head are at both stages of their end. Not built: the higher rate of a stage that was made anew.
    """

    recovers: ClassVar[bool] = True

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

    def neighbours(self, stage: int, stages: int) -> tuple[int, ...]:
        twins = {0: 1, 1: 0, stages - 2: stages - 1, stages - 1: stages - 2}
        return (twins[stage],) if stage in twins else (stage - 1, stage + 1)

    @classmethod
    def example(cls) -> tuple[Self, int, tuple[tuple[int, ...], ...]]:
        straight, swapped = (0, 1, 2, 3, 4, 5), (1, 0, 2, 3, 5, 4)
        return cls(), 6, (straight, swapped, straight)
