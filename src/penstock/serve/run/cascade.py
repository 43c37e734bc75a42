"""A model that drafts on while what it has drafted is verified."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as List
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
from torch import Tensor

from penstock.serve.choose.sampler import Sampled
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.drafted import Drafted, GoesOn
from penstock.serve.engine.sequence import Sequence
from penstock.serve.run.chains import Chains, Going
from penstock.serve.run.draft import ConfidentDraft
from penstock.serve.run.runner import Runner
from penstock.serve.run.trees import Trees
from penstock.speculate.tree import depths
from penstock.speculate.verifiers.contract import Verifier


@dataclasses.dataclass
class Guess:
    """What may come of a verification, and what is drafted behind that.

    Attributes:
        sequence: whose tokens are verified.
        tentative: a copy that has gone on by those that are guessed to be accepted, and goes on by what is drafted.
        text: all of its tokens when the verification is over. The last one is what the target says behind those that
            it accepts: it is there once it is guessed.
        most: how many tokens are drafted behind them at most, on each way.
        drafted: what was; None before, or where the text is at its end.
        wrong: something else has come out.
    """

    sequence: Sequence
    tentative: Sequence
    text: list[int]
    most: int
    drafted: Drafted | None = None
    wrong: bool = False

    def fits(self, entry: Entry) -> bool:
        """Whether it is what came out, and ``entry`` has room for what was drafted behind that."""
        if self.drafted is None or entry.sequence is not self.sequence or self.sequence.tokens != self.text:
            return False
        parents = self.drafted.parents.get(entry.slot)
        return parents is None or (len(parents) <= len(entry.window) and max(depths(parents)) <= entry.ahead)


class CascadeDraft(ConfidentDraft):
    """Drafts with a model, for the next step too: behind the likeliest outcome, while the target verifies.

    What it computes meanwhile lies in blocks of its own as far as the sequences have none yet. If the guess was right,
    the next step takes over the tokens; what is in its cache for them is computed anew when it is needed, several
    tokens in a pass. What ``goes_on`` says meanwhile may be by what it knew before the verification, or behind it.

    Args:
        runner: of the model, with a :class:`~penstock.serve.run.draft.DraftPlanner`. The last of its blocks are no
            sequence's: :func:`spare_blocks` for each slot.
        verifier: of its drafts.
        growth: of these.
        tokens: most that are computed in a pass.
        slots: how many sequences there are at most.
        rows: of each, how many are scored in a step at most.
        lane: where it is drafted meanwhile; None takes a thread.

    Attributes:
        guessed, right: how often a verification's outcome was guessed, and the drafts behind it were taken.
    """

    def __init__(
        self,
        runner: Runner,
        verifier: Verifier,
        growth: Chains | Trees,
        tokens: int,
        slots: int,
        rows: int,
        lane: Executor | None = None,
    ) -> None:
        super().__init__(runner, verifier, growth, tokens)
        spare = spare_blocks(rows, runner.block_size)
        first, self._rows = runner.blocks - slots * spare, rows
        self._spare = np.arange(first, runner.blocks, dtype=np.int32).reshape(slots, spare)
        self._lane = lane or ThreadPoolExecutor(1, "drafts")
        self._guesses: dict[int, Guess] = {}
        self._running: Future[None] | None = None
        self.guessed = self.right = 0

    def prepare(self, batch: Batch) -> None:
        for guess in self._guesses.values():
            known, text = guess.sequence.tokens, list(guess.text)  # as it is now: it grows in the other thread
            guess.wrong = guess.wrong or known[: len(text)] != text[: len(known)]
        running, self._running = self._running, None
        if running is not None:
            running.result()
        super().prepare(batch)

    def draft(self, batch: Batch, goes_on: GoesOn | None = None) -> Drafted:
        guesses = self._guesses
        entries = {entry.slot: entry for entry in batch.entries}
        wanted = self._awaited(batch)
        kept = {slot: guess for slot, guess in guesses.items() if slot in wanted and guess.fits(entries[slot])}
        rest = {slot: end for slot, end in wanted.items() if slot not in kept}
        drafted = self._grown(self._first(batch, rest), rest, batch.tables, goes_on)
        for slot, guess in kept.items():
            assert guess.drafted is not None
            drafted.adopt(guess.drafted, slot, len(entries[slot].window))
        self.right += len(kept)
        # Those of sequences whose step is under way, and none of this batch, may still be right.
        self._guesses = {slot: guess for slot, guess in guesses.items() if slot not in entries}
        self._begin([entries[slot] for slot, window in drafted.windows.items() if window], drafted, batch, goes_on)
        return drafted

    def _begin(self, entries: list[Entry], drafted: Drafted, batch: Batch, goes_on: GoesOn | None) -> None:
        """Has drafted, from now on, behind what ``entries`` are guessed to come to."""
        places = batch.tables.shape[1] * self.runner.block_size
        guessed = {entry.slot: self._guess(entry, drafted) for entry in entries}
        guesses = {
            slot: guess
            for slot, guess in guessed.items()
            if guess is not None and len(guess.text) + 1 + self._rows <= places
        }
        if not guesses:
            return
        self._guesses |= guesses
        self.guessed += len(guesses)
        tables = np.zeros_like(batch.tables)  # those of the batch change while this goes on
        for slot, guess in guesses.items():
            assert guess.sequence.held is not None
            own = len(guess.sequence.held.blocks)
            tables[slot] = batch.tables[slot]
            place = tables[slot, own : own + self._spare.shape[1]]
            place[:] = self._spare[slot, : len(place)]
        self._running = self._lane.submit(self._meanwhile, guesses, tables, goes_on)

    def _guess(self, entry: Entry, drafted: Drafted) -> Guess | None:
        """The guess that all is accepted on the way that the model would take itself; None where the text is at its
        end then, or nothing could be drafted behind it."""
        tentative, way = entry.sequence.tentative(), drafted.way(entry.slot)
        for token in way:
            tentative.tokens.append(token)
            if tentative.matcher is not None:
                tentative.matcher.consume(token)
        behind = min(tentative.limit, self.runner.context + 1) - len(tentative.tokens) - 2
        most = min(entry.ahead, behind)
        if most < 1 or not way or not _open(tentative):
            return None
        return Guess(entry.sequence, tentative, list(tentative.tokens), most)

    def _meanwhile(self, guesses: dict[int, Guess], tables: np.ndarray, goes_on: GoesOn | None) -> None:
        """What the other thread does. Of a tree, another way may be accepted than the one that is computed here, so
        that none of it counts as computed behind it."""
        with self._coverage.set_aside():
            self._go_on(guesses, tables, goes_on)

    def _go_on(self, guesses: dict[int, Guess], tables: np.ndarray, goes_on: GoesOn | None) -> None:
        """Drafts for ``guesses``, by slot: the token that the target may say, and what may follow it."""
        first = [self._behind(slot, guess, tables) for slot, guess in guesses.items()]
        entries, sampled = self._passed(self._caught_up(first, tables), tables)
        for entry, token in zip(entries, sampled.tokens.tolist(), strict=True):
            guess = guesses[entry.slot]
            guess.text.append(token)
            guess.tentative.tokens.append(token)
            if guess.tentative.matcher is not None:
                guess.tentative.matcher.consume(token)
        going = {slot: guess for slot, guess in guesses.items() if _open(guess.tentative) and not guess.wrong}
        first = [self._alone(slot, guess, len(guess.text) - 1) for slot, guess in going.items()]
        wanted = {slot: len(guess.text) - 1 + guess.most for slot, guess in going.items()}
        drafted = self._growth.grow(
            self._pass, self.sampler, first, wanted, tables, self._unless_wrong(guesses, goes_on)
        )
        for slot, guess in going.items():
            if drafted.windows.get(slot):
                guess.drafted = drafted

    def _behind(self, slot: int, guess: Guess, tables: np.ndarray) -> Entry:
        """What is not computed yet of the text of ``guess``, without the token that is not there yet."""
        [start] = self._coverage.lengths(tables[[slot]], np.array([len(guess.text) - 1])).tolist()
        return self._alone(slot, guess, start)

    def _alone(self, slot: int, guess: Guess, start: int) -> Entry:
        """The tokens of ``guess`` from ``start`` on, behind which one is drafted."""
        if guess.tentative.sampling.penalized:
            self.runner.planner.forget(slot)  # whose tokens are others now
        return Entry(guess.tentative, slot, start, len(guess.text) - start, 1)

    def _passed(self, entries: list[Entry], tables: np.ndarray) -> tuple[list[Entry], Sampled]:
        scored, sampled = self._pass(entries, tables)
        assert sampled is not None
        sampled.wait()
        return scored, sampled

    def _unless_wrong(self, guesses: dict[int, Guess], goes_on: GoesOn | None) -> Going:
        """As ``goes_on`` has it, but no further for a guess that has turned out to be wrong."""
        confident = None if goes_on is None else self._going(goes_on)

        def going(entries: list[Entry], tokens: Tensor, rows: List[int]) -> list[bool]:
            more = [True] * len(entries) if confident is None else confident(entries, tokens, rows)
            return [on and not guesses[entry.slot].wrong for on, entry in zip(more, entries, strict=True)]

        return going


def _open(sequence: Sequence) -> bool:
    """Whether its last token did not end the text."""
    failed = sequence.matcher is not None and sequence.matcher.failed
    return sequence.tokens[-1] not in sequence.stop and not failed


def spare_blocks(rows: int, size: int) -> int:
    """How many blocks of ``size`` a sequence takes beyond its own, of which at most so many ``rows`` are scored in a
    step: for the token behind what is verified, and the drafts of another step."""
    return -(-(1 + rows) // size)
