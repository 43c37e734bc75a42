"""Interleaved 1F1B: several chunks of the model on each device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pydantic import Field

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "interleaved_1f1b", papers=[6])
class Interleaved1F1B(PipelineSchedule):
    """1F1B over v = ``chunks`` stages a device, in rounds of p microbatches through one chunk (Megatron-LM).

    The bubble shrinks v-fold, to (p-1)/v times the forward and backward of a microbatch on a p-th of the model, for v
    times the transfers. Device d starts with 2(p-1-d) + (v-1)p forwards. The paper wants m to be a multiple of p. Where
    it is not, the m // p rounds (one, where m < p) are larger, as in PyTorch, and as even as they can be, which is ours
    where PyTorch refuses. The larger ones come first: a device holds more than with the smaller ones first, but those
    would wait for each other for ever (p = 9, m = 23, v = 3).
    """

    chunks: int = Field(2, ge=2)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        rounds = even_rounds(microbatches, max(1, microbatches // devices))
        orders = tuple(
            interleaved(devices, device, self.chunks, rounds, warmup=2 * (devices - 1 - device))
            for device in range(devices)
        )
        return Schedule(looped(devices, self.chunks), orders, microbatches)


def even_rounds(microbatches: int, count: int) -> list[range]:
    """The microbatches in ``count`` rounds, the larger ones first."""
    bounds = [-(-microbatches * k // count) for k in range(count + 1)]
    return [range(first, last) for first, last in itertools.pairwise(bounds)]


def interleaved(devices: int, device: int, chunks: int, rounds: Sequence[range], warmup: int) -> tuple[Task, ...]:
    """A device's order: each of ``rounds`` through each of its ``chunks``, forward from the first and backward from the
    last; F until the first round has come to the last chunk and ``warmup`` more, then F and B in turns."""
    forwards, backwards = (
        [Task(kind, chunk * devices + device, k) for own in rounds for chunk in order for k in own]
        for kind, order in ((Kind.F, range(chunks)), (Kind.B, range(chunks)[::-1]))
    )
    first = warmup + (chunks - 1) * len(rounds[0])
    order = forwards[:first]
    for step, backward in enumerate(backwards):
        order += [*forwards[first + step : first + step + 1], backward]
    return tuple(order)
