"""What an engine does to draft: decides how much, has it drafted, and learns what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as List

import msgspec

from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.drafted import DraftExecutor
from penstock.serve.engine.step_clock import StepClock
from penstock.speculate.contract import AWAITED, Shaper
from penstock.speculate.controllers.contract import Controller, Seen
from penstock.speculate.controllers.resting import Resting
from penstock.speculate.tree import way_of


class Speculation:
    """Drafting in one engine.

    Args:
        controller: decides how many tokens are drafted, and verified.
        most: how many the drafter drafts at a time at most.
        model: the one that drafts, or a head; None where what is drafted comes out of the text.
        shaper: of the trees of those that draft by probes.

    Attributes:
        model: the one that drafts, or a head; None without one.
        drafted, accepted: how often tokens at each depth were verified, and one of them accepted.
        goes_on: asked behind each drafted token if there is to be another; None where the controller does not care.
        clock: says how many seconds have passed.
    """

    def __init__(
        self, controller: Controller, most: int, model: DraftExecutor | None, shaper: Shaper | None = None
    ) -> None:
        self._control, self._weighs, self.model = controller.start(most), controller.weighs, model
        self._resting = Resting(self._control)
        self.shaper = shaper
        asks = controller.predicts or controller.by_confidence
        self.goes_on = self._control.goes_on if asks else None
        self._steps = StepClock()
        self.clock: Callable[[], float] = time.perf_counter
        self.drafted, self.accepted = [0] * most, [0] * most

    def ahead(self, running: int) -> int:
        """How many tokens may be drafted for a sequence in the next step, where so many run."""
        going = max(1, running)
        ahead = self._resting.ahead(going)
        if ahead and self.shaper is not None:
            self.shaper.plan(ahead, lambda rows: self._control.seconds(going * rows))
        return ahead

    @property
    def asleep(self) -> bool:
        """Whether the controller rests in the next step."""
        return self._resting.asleep

    def asks(self) -> List[int]:
        """As of :meth:`Control.asks`."""
        return self._control.asks()

    def expect(self, sequences: int, ahead: int, seconds: float) -> None:
        """As of :meth:`Control.expect`."""
        self._control.expect(sequences, ahead, seconds)

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
                probes = tuple(drafted.probes.get(entry.slot, entry.probes[:1]))
                count, scored = entry.count - less, entry.scored - less
                batch.entries[place] = msgspec.structs.replace(
                    entry, count=count, scored=scored, window=window, parents=parents, probes=probes
                )
        batch.proposals = self.model.proposals(drafted, len(batch.tables))
        batch.drafting = self.clock() - begun

    def begin(self, batch: Batch) -> None:
        """``batch`` is on its way."""
        # Whoever goes on was there when the last step ended.
        sequences = (entry.sequence for entry in batch.entries)
        self._steps.begin(batch.begun, lambda: any(len(each.tokens) > each.prompt for each in sequences))

    def end(self, batch: Batch) -> None:
        """What came out of ``batch`` is known."""
        batch.took = self._steps.end(self.clock())

    def learn(self, batch: Batch, going: list[Entry], counts: list[int]) -> None:
        """So many tokens came out of each of the entries of ``batch`` that are ``going`` on, which are its scored
        ones."""
        if batch.asleep or not any(each.sequence.draft is not None for each in going):
            return
        rows = batch.tokens
        if not batch.ahead:  # most steps where drafting loses: then it should cost nothing
            prompts = rows - len(going)
            self._control.learn(Seen(len(going), prompts, 0, (), (), batch.drafting, batch.took, rows, 0))
            return
        pairs = zip(going, counts, strict=True)
        may = [(each.ahead, count - 1) for each, count in pairs if each.sequence.draft is not None]
        drafted, accepted = zip(*may, strict=True)
        for length, taken in may:
            for depth in range(length):
                self.drafted[depth] += 1
                self.accepted[depth] += depth < taken
        probes = sum(sum(each.probes) for each in going)
        prompts = rows - len(going) - sum(len(each.window) for each in going) - probes
        self._control.learn(
            Seen(len(going), prompts, batch.ahead, drafted, accepted, batch.drafting, batch.took, rows, probes)
        )

    def probed(self, entry: Entry, tokens: List[int]) -> int:
        """How many probes stood behind the last of the ``tokens`` of ``entry``'s window that were accepted, all that it
        settled but the last; or behind its newest one."""
        if not entry.probes:
            return 0
        tree = entry.tree
        way = way_of(tree, tokens[:-1])
        if self.shaper is not None:
            self.shaper.learn(tree, way)
        return entry.probes[way[-1] + 1 if way else 0]
