"""Heads that draft, with what the target keeps: its cache, or its last hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.core.progress import Reporter, silent
from penstock.models.heads.contract import Continuing, Exits, Foresees, HeadModule, Prompts, Transfers
from penstock.models.paged import PagedTokens
from penstock.serve.choose.sampler import Sampled, Sampler
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.drafted import Drafted, GoesOn
from penstock.serve.run.chains import Chains
from penstock.serve.run.draft import Drafting, DraftModel
from penstock.serve.run.hidden import HiddenStates
from penstock.serve.run.planner import Fields, Planner
from penstock.serve.run.runner import Passed, Runner
from penstock.serve.run.shapes import Shapes
from penstock.serve.run.step import Part
from penstock.serve.run.trees import Trees
from penstock.speculate.verifiers.contract import Verifier


def copied_ahead(batch: Batch, size: int, copy: Callable[[list[int], list[int]], None]) -> bool:
    """Makes those copies of blocks before the target's step that the target makes at its beginning, since drafts read
    what is copied; it makes them once more, behind what is drafted. So that both come to the same, none are made, and
    nothing can be drafted, where a block that is copied from is written to, by the copies or by what would be drafted.

    Args:
        batch: what the target will compute.
        size: tokens of a block.
        copy: copies from the blocks of a list to those of another.

    Returns:
        Whether all is copied.
    """
    if not batch.copies:
        return True
    sources, targets = (list(each) for each in zip(*batch.copies, strict=True))
    written = set(targets)
    for entry in batch.entries:
        if entry.window:
            first, last = entry.start - entry.dropped, entry.start - entry.dropped + entry.rows - 1
            written.update(batch.tables[entry.slot, first // size : last // size + 1].tolist())
    if not written.isdisjoint(sources):
        return False
    copy(sources, targets)
    return True


class HeadDraft(Drafting):
    """Drafts for the sequences that decode: what the target keeps of the tokens before their newest one is there."""

    @property
    def planner(self) -> Planner:
        """Says what the next tokens of sequences ask for."""
        raise NotImplementedError

    @property
    def block_size(self) -> int:
        """Tokens of a block of the target's cache."""
        raise NotImplementedError

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole blocks of what is drafted from."""
        raise NotImplementedError

    def _first(self, batch: Batch, wanted: dict[int, int]) -> list[Entry]:
        first = list(self._decoding(batch, wanted))
        return first if first and copied_ahead(batch, self.block_size, self._copy) else []

    def _decoding(self, batch: Batch, wanted: dict[int, int]) -> Iterator[Entry]:
        for entry in batch.entries:
            newest = entry.start + entry.count - len(entry.window) - 1
            if entry.slot in wanted and newest == entry.start > 0 and newest < wanted[entry.slot]:
                if entry.sequence.sampling.penalized:
                    # Of what was drafted last, not all may have come out.
                    self.planner.forget(entry.slot)
                yield Entry(entry.sequence.tentative(), entry.slot, newest, 1, 1)


class ExitDraft(HeadDraft):
    """Drafts with the first layers of the target, on its cache. What they write there for drafted tokens, the target's
    step writes anew.

    Args:
        runner: of these layers, on the cache of the target.
        verifier: of the drafts.
        growth: of these.
    """

    def __init__(self, runner: Runner, verifier: Verifier, growth: Chains | Trees) -> None:
        super().__init__(verifier, growth, runner.device, runner.context)
        self._runner = runner

    @property
    def sampler(self) -> Sampler:
        return self._runner.sampler

    @property
    def planner(self) -> Planner:
        return self._runner.planner

    @property
    def block_size(self) -> int:
        return self._runner.block_size

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        self._runner.cache.copy(sources, targets)

    def _pass(self, entries: list[Entry], tables: np.ndarray, depth: int) -> tuple[list[Entry], Sampled | None]:
        return entries, self._runner.execute(self._runner.plan(Batch(entries, tables)))


class AtOnceDraft(HeadDraft):
    """Drafts from the states that the target keeps of the token before the newest one, for several tokens at once.

    Args:
        target: keeps its states.
        reach: how many tokens are guessed at most.
        verifier: of the drafts.
        growth: of these.
        planner, sampler: say what the next tokens ask for, and choose them.
    """

    def __init__(
        self,
        target: Runner,
        reach: int,
        verifier: Verifier,
        growth: Chains | Trees,
        planner: Planner,
        sampler: Sampler,
    ) -> None:
        super().__init__(verifier, growth, target.device, target.context)
        self._target, self._reach, self._planner, self._sampler = target, reach, planner, sampler
        self._row_of: dict[int, int] = {}

    # What those who guess give

    def _foresee(self, known: Tensor, entries: list[Entry], tables: np.ndarray) -> None:
        """Tokens are guessed behind ``entries``, by what is :meth:`_known_of` for them."""
        raise NotImplementedError

    def _ahead(self, rows: Tensor, depth: int) -> Tensor:
        """The guess at ``depth``, hidden states [R, hidden], behind some ``rows`` of the entries."""
        raise NotImplementedError

    # What they have from here

    def _known_of(self, entries: list[Entry], tables: np.ndarray) -> Tensor:
        """Of the tokens before ``entries``, the states [N, hidden] that the target keeps."""
        return self._hidden.read(tables, [(entry.slot, entry.start - 1) for entry in entries])

    @property
    def sampler(self) -> Sampler:
        return self._sampler

    @property
    def planner(self) -> Planner:
        return self._planner

    @property
    def _hidden(self) -> HiddenStates:
        assert self._target.hidden is not None
        return self._target.hidden

    @property
    def block_size(self) -> int:
        return self._target.block_size

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        self._hidden.copy(sources, targets)

    def _wanted(self, entry: Entry) -> int:
        newest = entry.start + entry.count - len(entry.window) - 1
        return min(super()._wanted(entry), newest + self._reach)

    @torch.inference_mode()
    def _pass(self, entries: list[Entry], tables: np.ndarray, depth: int) -> tuple[list[Entry], Sampled | None]:
        if depth == 0:
            self._row_of = {entry.slot: row for row, entry in enumerate(entries)}
            self._foresee(self._known_of(entries, tables), entries, tables)
        rows = upload(np.array([self._row_of[each.slot] for each in entries for _ in range(each.scored)]), self._device)
        logits = self._target.model.logits(self._ahead(rows, depth))
        placed, asked = self._planner.ask(entries, Fields.of(entries))
        for each in placed:
            self._sampler.place(each.slot, each.tokens, each.prompt)
        return entries, self._sampler.sample(logits, asked)[0].to_host()


class ForesightDraft(AtOnceDraft):
    """Drafts with a head that guesses from the last hidden states alone."""

    def __init__(self, target: Runner, head: Foresees, *more: Any) -> None:
        super().__init__(target, head.reach, *more)
        self._head = head
        self._known: Tensor

    def _foresee(self, known: Tensor, entries: list[Entry], tables: np.ndarray) -> None:
        self._known = known

    def _ahead(self, rows: Tensor, depth: int) -> Tensor:
        return self._head.ahead(self._known[rows], depth)


class TransferDraft(AtOnceDraft):
    """Drafts from states that a head makes of the target's behind its first layers, in one pass of the others for all
    tokens. What they write to the target's cache, in the places of the newest token and of drafted ones, the target's
    step writes anew."""

    def __init__(self, target: Runner, head: Transfers, *more: Any) -> None:
        super().__init__(target, head.reach, *more)
        self._head = head
        self._ends: dict[int, int] = {}
        self._passed: Tensor

    def _first(self, batch: Batch, wanted: dict[int, int]) -> list[Entry]:
        self._ends = wanted
        return super()._first(batch, wanted)

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        self._target.cache.copy(sources, targets)
        super()._copy(sources, targets)

    def _foresee(self, known: Tensor, entries: list[Entry], tables: np.ndarray) -> None:
        starts, slots = np.array([(each.start, each.slot) for each in entries]).T
        counts = np.array([self._ends[slot] for slot in slots.tolist()]) - starts
        there = np.arange(self._reach) < counts[:, None]
        rows, depths = there.nonzero()
        positions, cache = starts[rows] + depths, self._target.cache
        cache.plan(self._planner.layout(tables[slots], starts + counts, counts.cumsum(), rows, positions))
        context, own = PagedTokens(upload(positions, self._device), cache), upload(there, self._device)
        # Behind those that are there, nothing is drafted.
        self._passed = self._head.transfer(known)
        self._passed[own] = self._head.passed(self._target.model, self._passed[own], context)

    def _ahead(self, rows: Tensor, depth: int) -> Tensor:
        return self._passed[rows, depth]


class ProbedDraft(AtOnceDraft):
    """Drafts what the probes of the step before have guessed, as trees of the shapes that were planned."""

    _states: Tensor

    def draft(self, batch: Batch, goes_on: GoesOn | None = None) -> Drafted:
        self._growth = Shapes(batch)
        return super().draft(batch)

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        """What is drafted from does not lie in blocks."""

    def _known_of(self, entries: list[Entry], tables: np.ndarray) -> Tensor:
        """[N, reach, hidden]"""
        return self._target.probed[upload(np.array([entry.slot for entry in entries]), self._device)]

    def _foresee(self, known: Tensor, entries: list[Entry], tables: np.ndarray) -> None:
        self._states = known

    def _ahead(self, rows: Tensor, depth: int) -> Tensor:
        return self._states[rows, depth]


class ContinuingRunner(Runner):
    """Computes steps of a head that goes on with hidden states: those that the target keeps, and its own of drafted
    tokens, which lie in the places where the target's will be. It computes them eagerly.

    Args:
        target: keeps its hidden states.
    """

    def __init__(self, *args: Any, target: Runner, **options: Any) -> None:
        super().__init__(*args, **options)
        self._target = target

    def compile(self, tokens: int, report: Reporter = silent) -> None:
        """Nothing is compiled."""

    def try_graphs(self, free: Callable[[], int]) -> int:
        return 0

    def capture(self, report: Reporter = silent) -> None:
        """There are no graphs."""

    def _pass(self, part: Part, lane: int = 0) -> Passed:
        kept, model = self._target.hidden, self.model
        assert kept is not None and isinstance(model, Continuing)
        model.before = kept.before(part.plan, part.inputs[2])
        self.cache.plan(part.plan, lane)
        hidden = model.tip(*self.passes.begun(self._on_device(part.inputs)))[self._on_device(part.scored)]
        kept.write(self._on_device(part.plan.slots.numpy()[part.scored]), hidden)
        return Passed(model.logits(hidden) if len(part.scored) else None)


class ContinuingDraft(DraftModel):
    """Drafts with a head that goes on with hidden states, and has a cache of its own. What it has computed from hidden
    states of its own is computed once more when the target's are there."""

    def __init__(self, runner: ContinuingRunner, target: Runner, verifier: Verifier, tokens: int) -> None:
        super().__init__(runner, verifier, Chains(), tokens)
        self._target = target

    def draft(self, batch: Batch, goes_on: GoesOn | None = None) -> Drafted:
        kept = self._target.hidden
        assert kept is not None
        if not copied_ahead(batch, self._target.block_size, kept.copy):
            return Drafted()
        drafted = super().draft(batch)
        own = [entry for entry in batch.entries if entry.slot in drafted.windows and entry.count > 1]
        behind = [msgspec.structs.replace(entry, start=entry.start + 1, count=entry.count - 1) for entry in own]
        self._coverage.overwrite(behind, batch.tables)
        return drafted

    def _missing(self, batch: Batch, wanted: dict[int, int]) -> Iterator[Entry]:
        """Sequences that decode: before that, the target's hidden states are not there."""
        awaiting = [entry for entry in batch.entries if entry.count - len(entry.window) == 1]
        return super()._missing(dataclasses.replace(batch, entries=awaiting, parts=()), wanted)


def draft_with(
    head: HeadModule,
    target: Runner,
    verifier: Verifier,
    growth: Chains | Trees,
    slots: int,
    planner: Callable[[int, int], Planner],
    sampler: Callable[[int, int, torch.device], Sampler],
) -> HeadDraft:
    """Who drafts with ``head`` for the sequences of ``target`` in so many ``slots``."""
    if isinstance(head, Exits):
        decoder = head.decoder(target.model)
        return ExitDraft(Runner(decoder, target.cache, slots, target.context, 1, sampler, planner), verifier, growth)
    vocabulary, device = target.shape.vocabulary, target.device
    more = verifier, growth, planner(slots, target.block_size), sampler(slots, vocabulary, device)
    if isinstance(head, Transfers):
        return TransferDraft(target, head, *more)
    if isinstance(head, Prompts):
        return ProbedDraft(target, head.reach, *more)
    assert isinstance(head, Foresees)
    return ForesightDraft(target, head, *more)
