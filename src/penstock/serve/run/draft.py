"""A model that drafts, on the tables of the one it drafts for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as List

import msgspec
import numpy as np
import torch
from torch import Tensor

from penstock.models.acceptance.head import AcceptanceHead
from penstock.serve.choose.confidence import ConfidentSampler
from penstock.serve.choose.proposals import Proposals
from penstock.serve.choose.sampler import Sampled, Sampler
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.drafted import Drafted, GoesOn
from penstock.serve.engine.sequence import Sequence
from penstock.serve.run.chains import Chains, Going
from penstock.serve.run.planner import Planner
from penstock.serve.run.runner import Runner
from penstock.serve.run.trees import Trees
from penstock.speculate.contract import AWAITED
from penstock.speculate.verifiers.contract import Verifier


class DraftPlanner(Planner):
    """Makes steps of a model that drafts: nobody is told log-probabilities of what it says."""

    def _place(self, slot: int, sequence: Sequence) -> None:
        super()._place(slot, sequence)
        self._table[slot]["alternatives"] = -1


class Drafting:
    """Drafts for all sequences of a batch together. Whoever drafts says what is computed first, and how a pass is made.

    Args:
        verifier: of the drafts.
        growth: what becomes of the passes: chains or trees.
        device: where they are made.
        context: most tokens of a sequence.
    """

    def __init__(self, verifier: Verifier, growth: Chains | Trees, device: torch.device, context: int) -> None:
        self._verifier, self._growth, self._device, self._context = verifier, growth, device, context

    # What those who draft give

    @property
    def sampler(self) -> Sampler:
        """Chooses tokens. Where distributions are wanted of it, it is a
        :class:`~penstock.serve.choose.proposals.ProposingSampler`, and where trees are drafted a
        :class:`~penstock.serve.choose.proposals.BranchingSampler`."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> None:
        """The target is about to compute ``batch``."""

    def _first(self, batch: Batch, wanted: dict[int, int]) -> list[Entry]:
        """What the first pass computes; tokens follow behind the scored entries.

        Args:
            batch: what the target will compute.
            wanted: how far the texts are to go that await tokens, by slot, in tokens that have to be computed here.
        """
        raise NotImplementedError

    def _pass(self, entries: list[Entry], tables: np.ndarray, depth: int) -> tuple[list[Entry], Sampled | None]:
        """Queues the pass that drafts tokens at ``depth``; which entries are scored, in the order of their
        tokens."""
        raise NotImplementedError

    # What they have from here

    def draft(self, batch: Batch, goes_on: GoesOn | None = None) -> Drafted:
        """Drafts for the entries of ``batch`` that await tokens; ``goes_on`` is for those who predict."""
        wanted = self._awaited(batch)
        return self._growth.grow(self._pass, self.sampler, self._first(batch, wanted), wanted, batch.tables)

    def proposals(self, drafted: Drafted, slots: int) -> Proposals | None:
        """What was ``drafted`` for sequences in some of so many ``slots``, for the one who verifies it."""
        if not drafted.chances or self._verifier.matches:
            return None
        rows = np.full((slots, max(map(len, drafted.rows.values()))), -1)
        for slot, own in drafted.rows.items():
            rows[slot, : len(own)] = own
        drafts = np.full((len(drafted.drafts), max(map(len, drafted.drafts))), -1)
        for row, tokens in zip(drafts, drafted.drafts, strict=True):
            row[: len(tokens)] = tokens
        return Proposals(self._verifier, torch.cat(drafted.chances), drafts, rows)

    def _awaited(self, batch: Batch) -> dict[int, int]:
        """How far the texts of ``batch`` are to go that await tokens, by slot, in tokens that have to be computed
        here."""
        return {entry.slot: self._wanted(entry) for entry in batch.entries if entry.window[:1] == (AWAITED,)}

    def _wanted(self, entry: Entry) -> int:
        """How far the text of ``entry`` is to go, in tokens that have to be computed here."""
        newest = entry.start + entry.count - len(entry.window) - 1
        return min(newest + entry.ahead, self._context)


class DraftModel(Drafting):
    """Drafts with a model.

    Its cache has blocks of the same numbers as the target's, so that one set of tables and books holds for both: what
    is shared, forked, cut back or evicted there is so here. What it holds of a block may be less than the target
    does, since nothing is computed here for requests that draft nothing, nor while drafting does not pay; it catches up
    when it drafts (:class:`Coverage`).

    Args:
        runner: of the model, with a :class:`DraftPlanner`.
        verifier: of its drafts.
        growth: of these.
        tokens: most that are computed in a pass.
    """

    def __init__(self, runner: Runner, verifier: Verifier, growth: Chains | Trees, tokens: int) -> None:
        super().__init__(verifier, growth, runner.device, runner.context)
        self.runner, self._tokens = runner, tokens
        self._coverage = Coverage(runner.blocks, runner.block_size)

    @property
    def sampler(self) -> Sampler:
        return self.runner.sampler

    def draft(self, batch: Batch, goes_on: GoesOn | None = None) -> Drafted:
        if not (isinstance(self._growth, Chains) and self.runner.goes_on):
            return super().draft(batch)
        wanted = self._awaited(batch)
        given = self._pass, self.sampler, self._first(batch, wanted), wanted, batch.tables
        return self._growth.grow(*given, onward=self._drafted_onward)

    def prepare(self, batch: Batch) -> None:
        """What this cache holds of the places that are written is void."""
        self._coverage.forget(batch.restored)
        if batch.compactions:
            self._coverage.look_anew()
        if batch.copies:
            sources, targets = (list(each) for each in zip(*batch.copies, strict=True))
            self.runner.cache.copy(sources, targets)
            self._coverage.copy(sources, targets)
        self._coverage.overwrite(batch.entries, batch.tables)

    def _first(self, batch: Batch, wanted: dict[int, int]) -> list[Entry]:
        """What the entries bring, of sequences that draft, and what is missing before: prompts are computed beside the
        target. Of what does not fit into a pass, all but the end is computed here."""
        return self._caught_up(list(self._missing(batch, wanted)), batch.tables)

    def _missing(self, batch: Batch, wanted: dict[int, int]) -> Iterator[Entry]:
        drafting = [entry for entry in batch.entries if entry.sequence.draft is not None]
        slots, first = [entry.slot for entry in drafting], np.array([entry.start for entry in drafting], np.int64)
        starts = self._coverage.lengths(batch.tables[slots], first).tolist()
        for entry, start in zip(drafting, starts, strict=True):
            end = entry.start + entry.count - len(entry.window)
            awaits = entry.slot in wanted and end <= wanted[entry.slot]
            if not (awaits or not entry.scored) or end > self.runner.context:
                continue
            sequence = entry.sequence.tentative() if awaits else entry.sequence
            if sequence.sampling.penalized:
                # Of what was drafted last, not all may have come out.
                self.runner.planner.forget(entry.slot)
            yield Entry(sequence, entry.slot, start, end - start, int(awaits))

    def _caught_up(self, entries: list[Entry], tables: np.ndarray) -> list[Entry]:
        """What is left of ``entries`` once it can be computed in one pass."""
        while sum(entry.count for entry in entries) > self._tokens:
            left, pieces, rest = self._tokens, [], []
            for entry in entries:
                count = min(entry.count - 1, left)
                left -= count
                if count:
                    pieces.append(msgspec.structs.replace(entry, count=count, scored=0))
                rest.append(msgspec.structs.replace(entry, start=entry.start + count, count=entry.count - count))
            self._pass(pieces, tables)
            entries = rest
        return entries

    def _pass(self, entries: list[Entry], tables: np.ndarray, depth: int = 0) -> tuple[list[Entry], Sampled | None]:
        entries = sorted(entries, key=lambda entry: entry.count > 1)  # kernels for one token a sequence are the fastest
        sampled = self.runner.execute(self.runner.plan(Batch(entries, tables)))
        for entry in entries:
            # A tree's tokens are not where those will be that are accepted.
            self._coverage.extend(tables[entry.slot], entry.start, entry.start + entry.count - len(entry.window))
        return [entry for entry in entries if entry.scored], sampled

    def _drafted_onward(
        self, entries: list[Entry], tables: np.ndarray, wanted: dict[int, int]
    ) -> list[tuple[Entry, list[int]]]:
        """What is drafted behind ``entries`` up to where their texts are ``wanted``; nothing where the runner wants to
        be asked for each pass."""
        left = np.array([wanted.get(entry.slot, entry.start) - entry.start for entry in entries])
        tokens = self.runner.go_on(Batch(entries, tables), left)
        if tokens is None:
            return []
        for entry, count in zip(entries, left.tolist(), strict=True):
            self._coverage.extend(tables[entry.slot], entry.start, entry.start + count)
        chosen = Sampled(tokens).to_host().wait().tokens.T.tolist()
        return [
            (entry, own[entry.count - 1 : count])
            for entry, own, count in zip(entries, chosen, left.tolist(), strict=True)
        ]


class PredictingDraft(DraftModel):
    """Drafts chains with a model, and predicts behind each token whether the target will accept it.

    Args:
        runner: of the model, which keeps its hidden states, with a :class:`DraftPlanner`.
        verifier: of its drafts.
        tokens: most that are computed in a pass.
        head: predicts.
    """

    def __init__(self, runner: Runner, verifier: Verifier, tokens: int, head: AcceptanceHead) -> None:
        super().__init__(runner, verifier, Chains(), tokens)
        self._head = head

    def draft(self, batch: Batch, goes_on: GoesOn | None = None) -> Drafted:
        if goes_on is None:
            return super().draft(batch)
        wanted, chances = self._awaited(batch), dict[int, list[float]]()

        def going(entries: list[Entry], tokens: Tensor, rows: List[int]) -> list[bool]:
            predicted = self._predicted(entries, tokens, batch.tables)
            for entry, chance in zip(entries, predicted, strict=True):
                chances.setdefault(entry.slot, []).append(chance)
            return [goes_on(chances[entry.slot]) for entry in entries]

        return Chains().grow(self._pass, self.sampler, self._first(batch, wanted), wanted, batch.tables, going)

    @torch.inference_mode()
    def _predicted(self, entries: list[Entry], tokens: Tensor, tables: np.ndarray) -> list[float]:
        """How likely ``tokens`` int64 [N] are accepted that were drafted behind ``entries``."""
        kept = self.runner.hidden
        assert kept is not None
        hidden = kept.read(tables, [(entry.slot, entry.start + entry.count - 1) for entry in entries])
        chances: list[float] = self._head(self.runner.model, hidden, tokens.to(self.runner.device)).sigmoid().tolist()
        return chances


class ConfidentDraft(DraftModel):
    """Drafts with a model, and ends where that is not sure any more. Its sampler is a
    :class:`~penstock.serve.choose.confidence.ConfidentSampler`."""

    def draft(self, batch: Batch, goes_on: GoesOn | None = None) -> Drafted:
        wanted = self._awaited(batch)
        return self._grown(self._first(batch, wanted), wanted, batch.tables, goes_on)

    def _grown(self, first: list[Entry], wanted: dict[int, int], tables: np.ndarray, goes_on: GoesOn | None) -> Drafted:
        """What is drafted behind ``first``, as far as ``goes_on`` has it."""
        going = None if goes_on is None else self._going(goes_on)
        return self._growth.grow(self._pass, self.sampler, first, wanted, tables, going)

    def _going(self, goes_on: GoesOn) -> Going:
        """Asks ``goes_on`` by how sure the model was of what it has drafted for each sequence."""
        chances: dict[int, list[float]] = {}

        def going(entries: list[Entry], tokens: Tensor, rows: List[int]) -> list[bool]:
            assert isinstance(self.sampler, ConfidentSampler)
            for entry, sure in zip(entries, self.sampler.confidence[list(rows)].tolist(), strict=True):
                chances.setdefault(entry.slot, []).append(sure)
            return [goes_on(chances[each.slot]) for each in entries]

        return going


#: The sequence of no slot.
NOBODY = (-1, 0)


class Coverage:
    """How many tokens of each block the cache of a model that drafts holds, from the block's first on.

    Args:
        blocks, size: how many there are, of how many tokens.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self._held, self._size = np.zeros(blocks, np.int64), size
        #: By slot, the sequence that was looked at lately, by when it came, and where the target wrote then. While all
        #: that happens is that it writes the next token, or one behind that place, there is nothing to look at before
        #: the next block: what is held of this one ends before that place.
        self._lately: dict[int, tuple[int, int]] = {}

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """What is computed in this context is behind what was there before, and void at its end."""
        held = self._held.copy()
        try:
            yield
        finally:
            self._held = held
            self._lately.clear()

    def copy(self, sources: List[int], targets: List[int]) -> None:
        """Blocks were copied."""
        self._held[targets] = self._held[sources]
        self._lately.clear()

    def forget(self, blocks: List[int]) -> None:
        """Nothing of ``blocks`` is held."""
        if blocks:
            self._held[blocks] = 0
            self._lately.clear()

    def look_anew(self) -> None:
        """Sequences may have other blocks than before."""
        self._lately.clear()

    def overwrite(self, entries: List[Entry], tables: np.ndarray) -> None:
        """The target writes the tokens of ``entries``, of sequences whose blocks are in ``tables``."""
        lately, size, new = self._lately, self._size, list[Entry]()
        for entry in entries:
            arrival, since = lately.get(entry.slot, NOBODY)
            known = arrival == entry.sequence.arrival and since <= entry.start
            if not known or entry.count > 1 or not entry.start % size:
                new.append(entry)
        if not new:
            return
        lately.update([(entry.slot, (entry.sequence.arrival, entry.start)) for entry in new])
        given = [(entry.slot, entry.start, entry.start + entry.count) for entry in new]
        slots, starts, ends = np.array(given, np.int64).reshape(-1, 3).T
        firsts, offsets = np.divmod(starts, self._size)
        np.minimum.at(self._held, tables[slots, firsts], offsets)
        behind = -(-ends // self._size)
        for each in np.flatnonzero(behind > firsts + 1):
            self._held[tables[slots[each], firsts[each] + 1 : behind[each]]] = 0

    def extend(self, table: np.ndarray, start: int, end: int) -> None:
        """The tokens [start, end) were computed; those before them are there."""
        self._lately.clear()
        last = (end - 1) // self._size
        self._held[table[start // self._size : last]] = self._size
        self._held[table[last]] = end - last * self._size

    def lengths(self, tables: np.ndarray, most: np.ndarray) -> np.ndarray:
        """How many of the first ``most`` int64 [E] tokens are there of sequences with these ``tables`` [E, M] of
        blocks."""
        whole, rest = np.divmod(most, self._size)
        held, places = self._held[tables], np.arange(tables.shape[1])
        short = (held < self._size) & (places < whole[:, None])
        lacks = short.any(1)
        first = np.where(lacks, short.argmax(1), whole)
        # Of the first block that is not whole, or that need not be: it is behind the table where all of that is wanted.
        own = held[np.arange(len(held)), np.minimum(first, len(places) - 1)]
        found: np.ndarray = first * self._size + np.where(lacks, own, np.minimum(own, rest))
        return found
