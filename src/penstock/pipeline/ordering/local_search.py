"""Iterated local search over words.

Only what lies on the critical path, a chain of tasks that each begin when the one before ends, can make a schedule
shorter. So hill climbing moves tasks near the ends of the path's stretches on a device; where that finds nothing more,
a few random moves give it a new start. All is counted in tasks that are timed, not in seconds, and drawn from a fixed
seed, so that a result can be had again.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from penstock.pipeline.ordering.words import IMPOSSIBLE, Problem, Run, Word

#: Tasks that may be timed.
WORK = 200_000
#: What a move costs besides, in tasks.
OVERHEAD = 20
#: From how many of its starts the search climbs.
STARTS = 3
#: How many places a task moves at once.
REACH = 6
#: Random moves of a new start.
KICKS = 3
#: New starts in a row that may find nothing better.
PATIENCE = 60

#: Of the random moves.
SEED = 1

Move = tuple[int, int, int]  # device, from, to


def search(problem: Problem, starts: Sequence[list[Word]], work: int = WORK) -> list[Word]:
    """The best words found from ``starts``, which are possible and fit, within ``work``.

    What counts is the makespan, then the longest span of a device, then the sum of ends.
    """
    climb = _Climb(problem, work)
    runs = sorted((Run(problem, words) for words in starts), key=lambda run: run.cost)
    runs = [run for run, before in zip(runs, [None, *runs], strict=False) if before is None or run.cost > before.cost]
    current = best = min((climb.up(run) for run in runs[:STARTS]), key=lambda run: run.cost)
    patience = PATIENCE
    while climb.work > 0 and patience and best.cost[0] > problem.bound + 1e-9:
        run = climb.up(climb.kicked(current))
        if run.cost[0] <= current.cost[0]:
            current = run
        patience = PATIENCE if run.cost[0] < best.cost[0] else patience - 1
        best = min(best, run, key=lambda found: found.cost)
    return best.words


class _Climb:
    """Hill climbing with ``work`` left."""

    def __init__(self, problem: Problem, work: int) -> None:
        self.problem, self.work = problem, work
        self._rng = random.Random(SEED)

    def up(self, run: Run) -> Run:
        """Moves one task of the critical path at a time, as long as that lowers the cost."""
        better: Run | None = run
        while better is not None:
            run, better = better, None
            for move in critical_moves(run):
                found = self._moved(run, move, limit=run.cost[0])
                if found is not None and found.cost < run.cost:
                    better = found
                    break
                if self.work <= 0:
                    return run
        return run

    def kicked(self, run: Run) -> Run:
        """``run`` after a few random moves, none of which makes it impossible."""
        for _ in range(KICKS):
            device = self._draw(len(run.words))
            source = self._draw(len(run.words[device]))
            near = range(max(0, source - REACH), min(len(run.words[device]), source + REACH + 1))
            target = near[self._draw(len(near))]
            found = self._moved(run, (device, source, target))
            if found is not None and found.cost < IMPOSSIBLE:
                run = found
        return run

    def _draw(self, count: int) -> int:
        """A whole number below ``count``; of the generator's methods, only this one is the same in all versions."""
        return int(count * self._rng.random())

    def _moved(self, run: Run, move: Move, limit: float = math.inf) -> Run | None:
        """After ``move``; None where the device's word has no such move."""
        self.work -= OVERHEAD
        if not _possible(run, move):
            return None
        device, source, target = move
        words = run.words.copy()
        words[device] = words[device].copy()
        words[device].insert(target, words[device].pop(source))
        found = Run(self.problem, words, limit)
        self.work -= found.tasks
        return found


def critical_moves(run: Run) -> Iterator[Move]:
    """Moves to the ends of the stretches of a critical path from nearby."""
    for device, first, last in stretches(run):
        word = run.words[device]
        for near in range(first + 1, min(last, first + REACH) + 1):
            if word[near] != word[first]:
                yield device, near, first
        for near in range(max(first, last - REACH), last):
            if word[near] != word[last]:
                yield device, near, last


def stretches(run: Run) -> Iterator[tuple[int, int, int]]:
    """(device, first place, last place) of what a critical path has on one device at a time, from its end."""
    problem, words = run.problem, run.words
    device = max(range(len(words)), key=lambda d: run.timed[d][-1][1])
    last = len(words[device]) - 1
    while True:
        word, timed, seconds = words[device], run.timed[device], problem.seconds[device]
        first = last
        while first and timed[first][1] - seconds[word[first]] <= timed[first - 1][1] + 1e-9:
            first -= 1
        yield device, first, last
        number = timed[first][0]
        source = problem.sources[device][word[first]] if word[first] < 2 * problem.chunks else None
        if source is None:
            return
        device, letter, _ = source
        last = next(itertools.islice((place for place, x in enumerate(words[device]) if x == letter), number, None))


def _possible(run: Run, move: Move) -> bool:
    """Whether the device can do so: F before I before W of each microbatch, within its memory."""
    device, source, target = move
    problem, word, timed, v = run.problem, run.words[device], run.timed[device], run.problem.chunks
    letter, number, change = word[source], timed[source][0], run.problem.changes[word[source]]
    if target < source:
        passed = range(target, source)
        other, change, held = letter - v, change, run.held[device][target : source + 1]
    else:
        passed = range(source + 1, target + 1)
        other, change, held = letter + v, -change, run.held[device][source + 1 : target + 2]
    if any(word[place] == other and timed[place][0] == number for place in passed):
        return False
    return problem.fits(max(held) + change)
