"""Nano-batches within a step."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence as List
from typing import Self

from pydantic import Field

from penstock.plan.nano_batches import QUARTERS, Mix, Planner, Rates, StepCost, Work
from penstock.policy import policy
from penstock.serve.batching.contract import Batcher, Batching, Room
from penstock.serve.batching.sarathi import SarathiBatcher
from penstock.serve.engine.batch import Entry
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.sequence import Sequence


class NanoFlowBatcher(SarathiBatcher):
    """See :class:`NanoFlow`."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self._planner = planner

    def form(self, running: List[Sequence], room: Room) -> None:
        super().form(running, room)
        decodes = sum(1 for _ in itertools.takewhile(lambda entry: entry.rows == 1, room.entries))
        mix = Mix(work_of(room.entries[:decodes]), work_of(room.entries[decodes:]))
        cuts = cuts_of(room.entries, decodes)
        split = self._planner.best(mix, tuple(cuts))
        if split is not None:
            cut = cuts[split.place]
            room.split(cut, len(room.entries) - cut, lead=split.lead)


def work_of(entries: List[Entry]) -> Work:
    """What ``entries`` ask for."""
    return Work(
        tokens=sum(entry.rows for entry in entries),
        scored=sum(entry.scored for entry in entries),
        read=sum(entry.start + 1 for entry in entries if entry.rows == 1),
        pairs=sum(entry.rows * (entry.start + (entry.rows + 1) / 2) for entry in entries if entry.rows > 1),
    )


def cuts_of(entries: List[Entry], decodes: int) -> dict[int, int]:
    """Places at which a step can be cut, in quarters, and how many entries are before each; the first ``decodes`` of
    them have one token. Prompts are not cut: a quarter of them is where one ends nearby, if one does."""
    ends = list(itertools.accumulate(entry.rows for entry in entries[decodes:]))
    places = {round(decodes * quarter / QUARTERS): quarter for quarter in range(1, QUARTERS + 1)}
    for quarter in range(1, QUARTERS) if ends else ():
        before = bisect_left(ends, ends[-1] * quarter / QUARTERS)
        places[decodes + before + 1] = QUARTERS + round(QUARTERS * ends[before] / ends[-1])
    return {place: cut for cut, place in places.items() if 0 < cut < len(entries)}


@policy("serve.batching", "nanoflow", papers=[194])
class NanoFlow(Batching):
    """Steps like those of ``sarathi``, split in two where one part can compute while the other reads memory (NanoFlow).

    From the paper: nano-batches, whose operations run at the same time where they are short of different things, and
    the search of their sizes and order against rates of the device. Ours: a step has one or two of them; they are cut
    between sequences, at quarters of what decodes and of what is read in; they share the device as its scheduler of
    kernels pleases, the part that goes first at high priority, and not by fixed shares of its units; and a product that
    takes longer to read its weights than to multiply counts as memory, so that steps which only decode are split
    where they are large alone. Overlap of steps is the loop's affair.

    Attributes:
        rates: of the device, as `penstock bench nanoflow` measures them. None keeps steps whole, which is best where
            kernels leave no room for others: an H100 was measured to gain nothing from two streams.
        gain: the share of a step's time that a split must save at least, by the rates. It covers what they leave out:
            a second pass to launch.
    """

    rates: Rates | None = None
    gain: float = Field(0.05, ge=0, lt=1)

    def start(self, limits: Limits) -> Batcher:
        if self.rates is None:
            return SarathiBatcher()
        return NanoFlowBatcher(Planner(StepCost.of(limits.model, self.rates), self.gain))

    def at_work(self) -> Self:
        # Of a device that multiplies six tokens in the time in which it reads the weights: a few that decode, or the
        # short rest of a prompt, go beside a longer one.
        slow = Rates(flops=6e9, bandwidth=1e9, beside=1.0)
        return self if self.rates else self.model_copy(update={"rates": slow, "gain": 0.0})
