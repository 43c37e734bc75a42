"""A program at work on a problem: its coroutines, and the rounds in which what they wait for is done."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any

from penstock.core.errors import PenstockError
from penstock.search.branch import Branch, Extend, Until
from penstock.search.ledger import Wish, shares
from penstock.search.prices import Prices
from penstock.search.scorers.contract import Verdict
from penstock.search.search import BudgetSpentError, First, Judge, Search, States, Stream, Together, Work

#: Rounds in a row in which nothing is done, after which a program is taken for one that turns in circles.
IDLE = 1000


@dataclasses.dataclass(eq=False)
class Piece:
    """Tokens for a branch that are to be computed now.

    Attributes:
        branch: which.
        most: how many at most.
        until: where the extension that they belong to ends.
        stream: reads the extension's text, where its end depends on it.
        wanted: how many tokens the extension may have in all.
        top: how many of the most probable tokens are to be told at each place.
        race: of a :class:`~penstock.search.search.First`, which others run beside it.
        wish: what was granted last, ``most`` tokens, for which the engine ``generated`` so many; None once it is
            settled.
        text: of the extension so far; ``count`` tokens, ``told`` of them since the last grant.
        reached: whether the extension has come to its end.
    """

    branch: Branch
    until: Until
    stream: Stream | None
    wanted: int
    top: int = 0
    race: Race | None = None
    wish: Wish | None = None
    most: int = 0
    generated: int = 0
    text: str = ""
    count: int = 0
    told: int = 0
    reached: bool = False

    @property
    def open(self) -> bool:
        """Whether the extension can go on."""
        return not (self.reached or self.branch.finished) and self.count < self.wanted


@dataclasses.dataclass
class Race:
    """Extensions of which the first to end its text wins.

    Attributes:
        pieces: all of them.
        winner: the one that ended after the fewest tokens; of equals, the first.
    """

    pieces: list[Piece]
    winner: Piece | None = None

    def ended(self, piece: Piece) -> None:
        """``piece`` has come to the end of its text."""
        order = self.pieces.index
        if self.winner is None or (piece.count, order(piece)) < (self.winner.count, order(self.winner)):
            self.winner = piece

    def lost(self, piece: Piece) -> bool:
        """Whether ``piece`` cannot win any more."""
        return self.winner is not None and piece is not self.winner and piece.count >= self.winner.count


class Task:
    """A coroutine of a program, and what it waits for."""

    def __init__(self, work: Coroutine[Any, Any, Any], parent: Task | None = None, place: int = 0) -> None:
        self.work, self.parent, self.place = work, parent, place
        self.children: list[Task] = []
        self.results: list[Any] = []
        self.waiting = 0
        self.closed = False


class Play:
    """Runs a program round by round. In a round, all of its coroutines run until each waits; then what they wait for is
    done, by whoever computes: pieces are extended, and errands done. A round ends when all of that is done, so that
    what a program sees does not depend on what was done first.

    Args:
        search: the problem.
        work: the program.
        prices: of positions.
        others: the same of the search's other models, by name.

    Attributes:
        pieces, errands: what is to be begun: extensions, and what is done beside them; whoever begins it takes it out.
        done: whether the program has ended.
        answer: the branch that it gave; the best of what there was where its budget ended it.
        error: what ended it otherwise.
    """

    def __init__(
        self,
        search: Search,
        work: Coroutine[Any, Any, Branch | None],
        prices: Prices,
        others: Mapping[str, Prices] | None = None,
    ) -> None:
        self.search, self._prices = search, {"": prices, **(others or {})}
        self.pieces: list[Piece] = []
        self.errands: list[Judge | Work | States] = []
        self.done = False
        self.answer: Branch | None = None
        self.error: Exception | None = None
        self._asked: list[tuple[Task, Any]] = []
        self._extending: list[Piece] = []
        self._round: dict[int, list[Piece]] = {}
        self._under_way = 0
        self._granted = self._starved = False
        self._idle = 0
        self._top = Task(work)
        self._run([(self._top, None)])

    # What whoever computes tells

    def told(
        self,
        piece: Piece,
        tokens: Sequence[int],
        spread: Iterable[Sequence[float]],
        tops: Sequence[list[tuple[int, float]]] = (),
    ) -> bool:
        """``piece`` has come to these further ``tokens``; ``spread`` has log-probability, entropy and certainty of
        each, and ``tops``, where it asked for them, the most probable ones in its place. Tells whether it is at its
        end, whatever else may come."""
        branch = piece.branch
        for place, (token, (logprob, entropy, certainty)) in enumerate(zip(tokens, spread, strict=True)):
            if piece.reached:
                break
            if tops:
                branch.alternatives[len(branch.tokens)] = tops[place]
            branch.tokens.append(token)
            branch.logprobs.append(logprob)
            branch.entropies.append(entropy)
            branch.certainties.append(certainty)
            piece.count += 1
            piece.told += 1
            if piece.stream is not None:
                piece.text += piece.stream.push([token])
                self._read(piece)
        return piece.reached or (piece.race is not None and piece.race.lost(piece))

    def _read(self, piece: Piece) -> None:
        """Whether the extension's text has come to a stop string, or to where it is to end."""
        places = [(place, stop) for stop in self.search.stop if (place := piece.text.find(stop)) >= 0]
        if places:
            piece.branch.ended, piece.branch.cut = "stop", len(piece.text) - min(places)[0]
        piece.reached = bool(places) or piece.until.reached(piece.text)

    def ended(self, piece: Piece, why: str | None, generated: int) -> None:
        """``piece`` is done. ``why`` its text ended, None where it could go on; and how many tokens were generated for
        it."""
        branch, search = piece.branch, self.search
        piece.generated = generated
        branch.computed = max(branch.computed, len(branch.tokens) - 1)
        if why is not None and generated == piece.told and branch.ended is None:  # else the end was cut off
            branch.ended = why
        if branch.ended is None and not search.room(branch):
            branch.ended = "length"
        if branch.finished and piece.race is not None:
            piece.race.ended(piece)
        self._under_way -= 1
        self._go_on()

    def judged(self, judge: Judge, verdicts: Sequence[Verdict]) -> None:
        """The ``verdicts`` on the branches of ``judge``."""
        ledger = self.search.ledger
        for branch, verdict in zip(judge.branches, verdicts, strict=True):
            branch.score, branch.error = verdict.score, verdict.error
            ledger.scorings += 1
            ledger.failures += verdict.error is not None
        self._under_way -= 1
        self._go_on()

    def worked(self, asked: Work | States) -> None:
        """The outcome of ``asked`` is there."""
        self._under_way -= 1
        self._go_on()

    def close(self) -> None:
        """Ends the program, wherever it is."""
        _close(self._top)
        self.done = True

    def cut(self) -> None:
        """Ends the program, wherever it is, with the best of what it has."""
        self._settle()
        self.close()
        self._finish(None)

    # Rounds

    def _run(self, ready: list[tuple[Task, Any]]) -> None:
        """Lets coroutines run until all wait for something that is to be done."""
        while ready:
            while ready:
                task, value = ready.pop(0)
                if task.closed:
                    continue
                try:
                    asked = task.work.throw(value) if isinstance(value, BaseException) else task.work.send(value)
                except StopIteration as end:
                    ready += self._returned(task, end.value)
                except Exception as error:
                    ready += self._failed(task, error)
                else:
                    ready += self._ask(task, asked)
            if not self.done:
                self._begin()
            ready = [] if self.done or self._under_way else self._outcomes()

    def _ask(self, task: Task, asked: Any) -> list[tuple[Task, Any]]:
        if isinstance(asked, Together):
            task.children = [Task(work, task, place) for place, work in enumerate(asked.works)]
            task.waiting, task.results = len(task.children), [None] * len(task.children)
            return [(child, None) for child in task.children] or [(task, [])]
        if isinstance(asked, Extend | First | Judge | Work | States):
            self._asked.append((task, asked))
            return []
        error = TypeError(f"a program can wait for what its search gives it to wait for, not for {asked!r}")
        return [(task, error)]

    def _returned(self, task: Task, value: Any) -> list[tuple[Task, Any]]:
        parent = task.parent
        if parent is None:
            self._finish(value)
            return []
        parent.results[task.place] = value
        parent.waiting -= 1
        return [] if parent.waiting else [(parent, parent.results)]

    def _failed(self, task: Task, error: Exception) -> list[tuple[Task, Any]]:
        parent = task.parent
        if parent is None:
            if not isinstance(error, BudgetSpentError):
                self.error = error
            self._finish(None)
            return []
        for child in parent.children:
            _close(child)
        self._asked = [(each, asked) for each, asked in self._asked if not each.closed]
        parent.children = []
        return [(parent, error)]

    def _finish(self, value: Any) -> None:
        search = self.search
        if value is not None and not isinstance(value, Branch):
            self.error = self.error or TypeError(f"a program gives a branch or None, not {value!r}")
            value = None
        self.answer = value if value is not None else search.best(search.leaves)
        if self.answer is not None:
            self.answer.fate = "answer"
        self.done = True

    def _begin(self) -> None:
        """What the coroutines ask for is to be done."""
        self._granted = self._starved = False
        self._round.clear()
        self._extending = []
        for place, (_, asked) in enumerate(self._asked):
            if isinstance(asked, States) and not self._paid(asked):
                continue
            if isinstance(asked, Judge | Work | States):
                self._under_way += 1
                self.errands.append(asked)
                if isinstance(asked, Judge):
                    self.search.ledger.scored += sum(len(each.generated) for each in asked.branches)
                continue
            race = None
            if isinstance(asked, First):
                race = Race([])
                pieces = [self._piece(each, Until(), race) for each in asked.branches]
                race.pieces = pieces
            else:
                pieces = [self._piece(asked.branch, asked.until, top=asked.top)]
            self._round[place] = pieces
            self._extending += pieces
        self._idle = 0 if self._under_way or any(each.open for each in self._extending) else self._idle + 1
        if self._idle > IDLE:
            self.error = PenstockError(f"the program does nothing, {IDLE:,} rounds in a row")
            self.close()
        else:
            self._grant()

    def _paid(self, states: States) -> bool:
        """Charges the forward passes that ``states`` asks for, if the budget pays for all of them."""
        ledger, unit = self.search.ledger, self.search.budget.unit
        texts = [(self._prices[each.model], len(each.tokens)) for each in states.branches]
        if sum(prices.cost(unit, 0, count) for prices, count in texts) > self.search.left:
            self.search.exhausted = True
            states.outcome = BudgetSpentError("the budget does not pay for these hidden states")
            return False
        for prices, count in texts:
            ledger.read(prices, count)
        return True

    def _piece(self, branch: Branch, until: Until, race: Race | None = None, top: int = 0) -> Piece:
        room = self.search.room(branch)
        if not room and not branch.finished:
            branch.ended = "length"
        reads = until.text or until.pattern or self.search.stop
        stream = branch.texts.stream(branch.tokens) if reads else None
        return Piece(branch, until, stream, room if until.tokens is None else min(room, until.tokens), top, race)

    def _go_on(self) -> None:
        """Grants tokens while there are some to grant, and ends the round when nothing is under way any more."""
        if self._under_way:
            return
        self._settle()
        self._grant()
        if not self._under_way:
            self._run(self._outcomes())

    def _settle(self) -> None:
        """Pays for what was granted, in the order of the branches, whichever was done first: sums have to be the same
        to the last bit."""
        for piece in self._extending:
            if piece.wish is not None:
                if piece.race is not None and piece.race.winner is not None:
                    self._cut(piece, piece.count - piece.race.winner.count)
                self.search.ledger.extend(piece.wish, piece.told)
                self.search.ledger.discarded += piece.generated - piece.told
                piece.wish = None

    def _cut(self, piece: Piece, count: int) -> None:
        """Takes back the last ``count`` tokens, which one that has lost its race got ahead of the winner."""
        if count > 0:
            branch = piece.branch
            for each in (branch.tokens, branch.logprobs, branch.entropies, branch.certainties):
                del each[len(each) - count :]
            branch.ended, branch.cut = None, 0
            branch.computed = min(branch.computed, len(branch.tokens))
            piece.told -= count
            piece.count -= count

    def _grant(self) -> None:
        going = [each for each in self._extending if each.open and not (each.race is not None and each.race.lost(each))]
        if not going:
            return
        wishes = self._wishes(going)
        granted = shares(wishes, self.search.budget.unit, self.search.left)
        self._granted |= any(granted)
        self._starved = not any(granted)
        self.search.exhausted |= self._starved
        for piece, wish, most in zip(going, wishes, granted, strict=True):
            piece.wish, piece.most, piece.told = wish if most else None, most, 0
            if most:
                for branch, count in _passed(piece.branch).items():
                    branch.computed = count
                self._under_way += 1
                self.pieces.append(piece)

    def _wishes(self, pieces: Sequence[Piece]) -> list[Wish]:
        """What ``pieces`` would have computed: of a text that several go on from, the first computes what is new."""
        wishes: list[Wish] = []
        known: dict[Branch, int] = {}
        for piece in pieces:
            line = piece.branch.line
            # Of an ancestor, only what it has in common with the next one, which may go on from before its end. The
            # newest token is computed again: its scores are not kept.
            common = [*(each.start for each in line[1:]), len(piece.branch.tokens)]
            computed = max(min(known.get(each, each.computed), own) for each, own in zip(line, common, strict=True))
            computed = min(computed, len(piece.branch.tokens) - 1)
            prices = self._prices[piece.branch.model]
            wishes.append(Wish(len(piece.branch.tokens), computed, piece.wanted - piece.count, prices, line[0].start))
            known |= _passed(piece.branch)
        return wishes

    def _outcomes(self) -> list[tuple[Task, Any]]:
        """The coroutines that waited, each with what it waited for."""
        asked, self._asked = self._asked, []
        ready: list[tuple[Task, Any]] = []
        for place, (task, each) in enumerate(asked):
            pieces = self._round.get(place, [])
            if isinstance(each, Judge):
                ready.append((task, each.branches))
            elif isinstance(each, Work | States):
                ready.append((task, each.outcome))
            elif self._starved and not self._granted and any(piece.open for piece in pieces):
                ready.append((task, BudgetSpentError("the budget is spent")))
            else:
                ready.append((task, self._outcome(each, pieces)))
        return ready

    def _outcome(self, asked: Extend | First, pieces: list[Piece]) -> Branch:
        for piece in pieces:
            if piece.count:
                piece.branch.steps.append(len(piece.branch.tokens))
        if isinstance(asked, Extend):
            return asked.branch
        race = pieces[0].race
        assert race is not None
        winner = race.winner or max(pieces, key=lambda each: each.count)
        for piece in pieces:
            if asked.drop and piece is not winner:
                piece.branch.drop()
        return winner.branch


def _passed(branch: Branch) -> dict[Branch, int]:
    """How many tokens of each ancestor of ``branch`` are computed where ``branch`` is: all of one that was given, which
    is computed on the way; of one that was extended, its newest token stays to be computed by each that goes on."""
    return {
        each: each.computed if each.computed >= len(each.tokens) - 1 else after.start
        for each, after in itertools.pairwise(branch.line)
    }


def _all(task: Task) -> Iterable[Task]:
    yield task
    for child in task.children:
        yield from _all(child)


def _close(task: Task) -> None:
    for each in _all(task):
        each.closed = True
        each.work.close()
