"""What an engine does to draft: decides how much, has it drafted, and learns what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from penstock.serve.engine.batch import Batch
from penstock.serve.engine.sequence import Sequence
from penstock.speculate.contract import AWAITED
from penstock.speculate.controllers.contract import Controller, Seen

if TYPE_CHECKING:
    from penstock.serve.run.draft import Drafting


class Speculation:
    """Drafting in one engine.

    Args:
        controller: decides how many tokens are drafted, and verified.
        most: how many the drafter drafts at a time at most.
        model: the one that drafts, or a head; None where what is drafted comes out of the text.

    Attributes:
        model: the one that drafts, or a head; None without one.
        drafted, accepted: how often tokens at each depth were verified, and one of them accepted.
        goes_on: asked behind each drafted token if there is to be another; None where the controller does not care.
        clock: says how many seconds have passed.
    """

    def __init__(self, controller: Controller, most: int, model: Drafting | None) -> None:
        self._control, self._weighs, self.model = controller.start(most), controller.weighs, model
        asks = controller.predicts or controller.by_confidence
        self.goes_on = self._control.goes_on if asks else None
        self._published = 0.0
        self.clock: Callable[[], float] = time.perf_counter
        self.drafted, self.accepted = [0] * most, [0] * most

    def ahead(self, running: list[Sequence]) -> int:
        """How many tokens may be drafted for a sequence in the next step, where these run."""
        going = sum(each.draft is not None and each.decoding for each in running)
        return self._control.ahead(max(1, going))

    def draft(self, batch: Batch) -> None:
        """Has drafted what the entries of ``batch`` await. They are shorter then where less was drafted or kept."""
        if self.model is None:
            return
        self.model.prepare(batch)
        if not batch.ahead:
            return
        begun = self.clock()
        drafted = self.model.draft(batch, self.goes_on)
        if self._weighs:
            confidence = drafted.confidence()
            drafted.cut(dict(zip(confidence, self._control.kept(list(confidence.values())), strict=True)))
        for place, entry in enumerate(batch.entries):
            if entry.window[:1] == (AWAITED,):
                window, parents = (tuple(each.get(entry.slot, ())) for each in (drafted.windows, drafted.parents))
                less = len(entry.window) - len(window)
                batch.entries[place] = msgspec.structs.replace(
                    entry, count=entry.count - less, scored=entry.scored - less, window=window, parents=parents
                )
        batch.proposals = self.model.proposals(drafted, len(batch.tables))
        batch.drafting = self.clock() - begun

    def learn(self, batch: Batch, counts: list[int]) -> None:
        """What came out of ``batch`` is known: so many tokens of each of its scored entries."""
        now = self.clock()
        since, self._published = max(batch.begun, self._published), now
        going = [entry for entry in batch.entries if entry.scored]
        pairs = zip(going, counts, strict=True)
        may = [(each.ahead, count - 1) for each, count in pairs if each.sequence.draft is not None]
        if not may:
            return
        drafted, accepted = zip(*may, strict=True)
        for length, taken in may:
            for depth in range(length):
                self.drafted[depth] += 1
                self.accepted[depth] += depth < taken
        prompts = batch.tokens - len(going) - sum(len(each.window) for each in going)
        self._control.learn(Seen(len(going), prompts, batch.ahead, drafted, accepted, batch.drafting, now - since))
