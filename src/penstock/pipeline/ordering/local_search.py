"""Hill climbing over words: what is on the critical path moves a few places, as long as that lowers the cost."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.pipeline.ordering.words import Cost, Problem, Run, Word

#: How many places a task moves at once.
REACH = 6


def improve(problem: Problem, words: list[Word], work: int) -> tuple[Cost, list[Word], int]:
    """The best words found from ``words`` within ``work``, the tasks that may be timed; their cost, and what is left.

    The critical path is a chain of tasks that each begin when the one before ends, on the same device or on the one
    that their input comes from. Only a move within one of its stretches on a device, to or over the stretch's end, can
    shorten it. What is kept is the makespan, then the longest span, then the sum of ends.
    """
    words = [list(word) for word in words]
    tasks = sum(map(len, words))
    run = Run(problem, words)
    moved = True
    while moved:
        moved = False
        for device, source, target in list(_moves(run)):
            if work < tasks:
                return run.cost, words, work
            word = words[device]
            if not _possible(problem, word, source, target):
                continue
            words[device] = changed = list(word)
            changed.insert(target, changed.pop(source))
            work -= tasks
            found = Run(problem, words, run.cost[0])
            if found.cost < run.cost:
                run, moved = found, True
                break
            words[device] = word
    return run.cost, words, work


def _moves(run: Run) -> Iterator[tuple[int, int, int]]:
    """(device, from, to) of the moves near the ends of the stretches of a critical path."""
    for device, first, last in stretches(run):
        for position in range(first + 1, min(last, first + REACH) + 1):
            if run.words[device][position] != run.words[device][first]:
                yield device, position, first
        for position in range(max(first, last - REACH), last):
            if run.words[device][position] != run.words[device][last]:
                yield device, position, last


def stretches(run: Run) -> Iterator[tuple[int, int, int]]:
    """(device, first, last) of the stretches of a critical path, from the end to the beginning."""
    problem, v = run.problem, run.problem.chunks
    timed = []
    for word, ends in zip(run.words, run.ends, strict=True):
        counts = [0] * (3 * v)
        own = []
        for letter in word:
            own.append((ends[letter][counts[letter]], counts[letter]))
            counts[letter] += 1
        timed.append(own)
    device = max(range(len(timed)), key=lambda d: timed[d][-1][0])
    last = len(timed[device]) - 1
    while last >= 0:
        first = last
        times, own = problem.seconds[device], timed[device]
        while first and own[first][0] - times[run.words[device][first]] <= own[first - 1][0] + 1e-9:
            first -= 1
        yield device, first, last
        letter, number = run.words[device][first], own[first][1]
        source = problem.sources[device][letter] if letter < 2 * v else None
        if source is None:
            return
        device, made, _ = source
        last = next(at for at, (x, (_, n)) in enumerate(zip(run.words[device], timed[device], strict=True)) if (x, n) == (made, number))


def _possible(problem: Problem, word: Word, source: int, target: int) -> bool:
    """Whether after the move F comes before I before W, and memory suffices."""
    low, high = min(source, target), max(source, target)
    changed = word[low : high + 1]
    changed.insert(target - low, changed.pop(source - low))
    v = problem.chunks
    counts = [0] * (3 * v)
    held = 0.0
    for letter in word[:low]:
        counts[letter] += 1
        held += problem.changes[letter]
    for letter in changed:
        counts[letter] += 1
        held += problem.changes[letter]
        if letter >= v and counts[letter] > counts[letter - v]:
            return False
        if not problem.fits(held):
            return False
    return True
