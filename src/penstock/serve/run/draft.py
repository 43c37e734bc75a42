"""A model that drafts, on the tables of the one it drafts for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as List

import numpy as np
import torch
from torch import Tensor

from penstock.serve.choose.proposals import Proposals, ProposingSampler
from penstock.serve.choose.sampler import Sampled, Sampler
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.sequence import Sequence
from penstock.serve.run.planner import Planner
from penstock.serve.run.runner import Runner
from penstock.speculate.contract import AWAITED
from penstock.speculate.verifiers.contract import Verifier


class DraftPlanner(Planner):
    """Makes steps of a model that drafts: nobody is told log-probabilities of what it says."""

    def _place(self, slot: int, sequence: Sequence) -> None:
        super()._place(slot, sequence)
        self._table[slot]["alternatives"] = -1


@dataclasses.dataclass
class Drafted:
    """What was drafted.

    Attributes:
        windows: the tokens, by the slot of their sequence.
        chances: the distributions float32 [n, V] of each pass that they were drawn from, where they are written down.
        rows: by slot, the rows of these, counted over all passes.
    """

    windows: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    chances: list[Tensor] = dataclasses.field(default_factory=list)
    rows: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    def confidence(self) -> dict[int, list[float]]:
        """By slot, for each token the probability of the one that was the likeliest in its place."""
        sure = [each for chances in self.chances for each in chances.amax(-1).tolist()]
        return {slot: [sure[row] for row in self.rows[slot][: len(own)]] for slot, own in self.windows.items()}


class Drafting:
    """Drafts for all sequences of a batch together, token by token. Whoever drafts says what is computed first, and how
    a pass is made.

    Args:
        verifier: of the drafts.
        device: where they are made.
        context: most tokens of a sequence.
    """

    def __init__(self, verifier: Verifier, device: torch.device, context: int) -> None:
        self._verifier, self._device, self._context = verifier, device, context

    # What those who draft give

    @property
    def sampler(self) -> Sampler:
        """Chooses tokens. Where distributions are wanted of it, it is a
        :class:`~penstock.serve.choose.proposals.ProposingSampler`."""
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
        """Queues the pass that drafts the token at ``depth``; which entries are scored, in the order of their
        tokens."""
        raise NotImplementedError

    # What they have from here

    def draft(self, batch: Batch) -> Drafted:
        """Drafts for the entries of ``batch`` that await tokens."""
        drafted = Drafted()
        wanted = {entry.slot: self._wanted(entry) for entry in batch.entries if entry.window[:1] == (AWAITED,)}
        open_ = self._first(batch, wanted)
        # Where the host has to see each token, or has it at no cost, it is read at once; else all of them at the end.
        at_once = self._device.type == "cpu" or any(entry.sequence.sampling.waits for entry in open_)
        queued: list[tuple[list[Entry], Sampled]] = []
        depth = 0
        while open_:
            scored, sampled = self._pass(open_, batch.tables, depth)
            if sampled is None:
                break
            self._write_down(scored, drafted)
            queued.append((scored, sampled))
            if at_once:
                _read([queued.pop()], drafted)
            open_ = [_next(entry) for entry in scored if entry.start + entry.count < wanted[entry.slot]]
            open_ = [entry for entry in open_ if not at_once or _goes_on(entry.sequence)]
            depth += 1
        _read(queued, drafted)
        return drafted

    def proposals(self, drafted: Drafted, slots: int, window: int) -> Proposals | None:
        """What was ``drafted``, up to ``window`` tokens in each of so many ``slots``, for the one who verifies it."""
        if not drafted.chances or self._verifier.matches:
            return None
        rows = np.full((slots, window), -1)
        for slot, own in drafted.rows.items():
            rows[slot, : len(own)] = own[:window]
        return Proposals(self._verifier, torch.cat(drafted.chances), rows)

    def _wanted(self, entry: Entry) -> int:
        """How far the text of ``entry`` is to go, in tokens that have to be computed here."""
        return min(entry.start + entry.count - 1, self._context)

    def _write_down(self, scored: List[Entry], drafted: Drafted) -> None:
        sampler = self.sampler
        if isinstance(sampler, ProposingSampler):
            for row, entry in enumerate(scored, sum(map(len, drafted.chances))):
                drafted.rows.setdefault(entry.slot, []).append(row)
            drafted.chances.append(sampler.proposed)


class DraftModel(Drafting):
    """Drafts with a model.

    Its cache has blocks of the same numbers as the target's, so that one set of tables and books holds for both: what
    is shared, forked, cut back or thrown out there is so here. What it holds of a block may be less than the target
    does, since nothing is computed here for requests that draft nothing, nor while drafting does not pay; it catches up
    when it drafts (:class:`Coverage`).

    Args:
        runner: of the model, with a :class:`DraftPlanner`.
        verifier: of its drafts.
        tokens: most that are computed in a pass.
    """

    def __init__(self, runner: Runner, verifier: Verifier, tokens: int) -> None:
        super().__init__(verifier, runner.device, runner.context)
        self.runner, self._tokens = runner, tokens
        self._coverage = Coverage(runner.blocks, runner.block_size)

    @property
    def sampler(self) -> Sampler:
        return self.runner.sampler

    def prepare(self, batch: Batch) -> None:
        """What this cache holds of the places that are written is void."""
        self._coverage.forget(batch.restored)
        if batch.copies:
            sources, targets = (list(each) for each in zip(*batch.copies, strict=True))
            self.runner.cache.copy(sources, targets)
            self._coverage.copy(sources, targets)
        for entry in batch.entries:
            self._coverage.overwrite(batch.tables[entry.slot], entry.start, entry.start + entry.count)

    def _first(self, batch: Batch, wanted: dict[int, int]) -> list[Entry]:
        """What the entries bring, of sequences that draft, and what is missing before: prompts are computed beside the
        target. Of what does not fit into a pass, all but the end is computed here."""
        return self._caught_up(list(self._missing(batch, wanted)), batch.tables)

    def _missing(self, batch: Batch, wanted: dict[int, int]) -> Iterator[Entry]:
        for entry in batch.entries:
            end = entry.start + entry.count - len(entry.window)
            awaits = entry.slot in wanted and end <= wanted[entry.slot]
            if entry.sequence.draft is None or not (awaits or not entry.scored) or end > self.runner.context:
                continue
            start = self._coverage.length(batch.tables[entry.slot], entry.start)
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
                    pieces.append(dataclasses.replace(entry, count=count, scored=0))
                rest.append(dataclasses.replace(entry, start=entry.start + count, count=entry.count - count))
            self._pass(pieces, tables)
            entries = rest
        return entries

    def _pass(self, entries: list[Entry], tables: np.ndarray, depth: int = 0) -> tuple[list[Entry], Sampled | None]:
        entries = sorted(entries, key=lambda entry: entry.count > 1)  # kernels for one token a sequence are the fastest
        sampled = self.runner.launch(Batch(entries, tables))
        for entry in entries:
            self._coverage.extend(tables[entry.slot], entry.start, entry.start + entry.count)
        return [entry for entry in entries if entry.scored], sampled


def _next(entry: Entry) -> Entry:
    """The token behind ``entry``, alone."""
    return Entry(entry.sequence, entry.slot, entry.start + entry.count, 1, 1)


def _goes_on(sequence: Sequence) -> bool:
    """Whether the last token did not end the text."""
    failed = sequence.matcher is not None and sequence.matcher.failed
    return sequence.tokens[-1] not in sequence.stop and not failed


def _read(queued: Iterable[tuple[list[Entry], Sampled]], drafted: Drafted) -> None:
    """The host learns which tokens were drafted; their sequences go on by them, up to one that ends the text."""
    for scored, sampled in queued:
        sampled.wait()
        for entry, token in zip(scored, sampled.tokens.tolist(), strict=True):
            sequence, window = entry.sequence, drafted.windows.setdefault(entry.slot, [])
            if window and not _goes_on(sequence):
                continue
            window.append(token)
            sequence.tokens.append(token)
            if sequence.matcher is not None:
                sequence.matcher.consume(token)


class Coverage:
    """How many tokens of each block the cache of a model that drafts holds, from the block's first on.

    Args:
        blocks, size: how many there are, of how many tokens.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self._held, self._size = np.zeros(blocks, np.int64), size

    def copy(self, sources: List[int], targets: List[int]) -> None:
        """Blocks were copied."""
        self._held[targets] = self._held[sources]

    def forget(self, blocks: List[int]) -> None:
        """Nothing of ``blocks`` is held."""
        self._held[blocks] = 0

    def overwrite(self, table: np.ndarray, start: int, end: int) -> None:
        """The target writes the tokens [start, end) of the sequence with this ``table`` of blocks."""
        first, offset = divmod(start, self._size)
        self._held[table[first]] = min(self._held[table[first]], offset)
        self._held[table[first + 1 : -(-end // self._size)]] = 0

    def extend(self, table: np.ndarray, start: int, end: int) -> None:
        """The tokens [start, end) were computed; those before them are there."""
        last = (end - 1) // self._size
        self._held[table[start // self._size : last]] = self._size
        self._held[table[last]] = end - last * self._size

    def length(self, table: np.ndarray, most: int) -> int:
        """How many of the first ``most`` tokens of a sequence are there."""
        whole, rest = divmod(most, self._size)
        held = self._held[table[: whole + (rest > 0)]]
        short = np.flatnonzero(held[:whole] < self._size)
        if short.size:
            return int(short[0] * self._size + held[short[0]])
        return whole * self._size + (min(int(held[whole]), rest) if rest else 0)
