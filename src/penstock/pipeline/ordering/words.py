"""Orders as words: each device's tasks, without their microbatches.

Where all microbatches pass the same stages, they are alike: each device may take them in turn for each stage and kind,
without loss, since exchanging two of them changes no time and no memory. What is left to choose is one word for each
device, over the letters F, I and W of each of its stages.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from penstock.pipeline.ir.schedule import Kind, Placement, Schedule, Task

#: A device's letters in order. A letter is v times a kind (F, I or W) plus the number of one of its v stages.
Word = list[int]
#: Makespan, longest span of a device, and the sum of ends, by which a search sees its way on plateaus.
Cost = tuple[float, float, float]

IMPOSSIBLE: Cost = (math.inf, math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A pipeline to be ordered, each device of which has v stages.

    Attributes:
        placement: the one device of each stage.
        forward, input_grad, weight_grad: seconds of F, I and W for each stage.
        transfer: seconds between two devices.
        memory: the activations, of one microbatch on a stage each, that a device may hold at once: v or more.
        deferred: of an activation, the share that I leaves for W.
        microbatches: m.
    """

    placement: Placement
    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    transfer: float
    memory: float
    deferred: float
    microbatches: int

    @functools.cached_property
    def stages(self) -> list[list[int]]:
        """For each device its stages, from the first to the last."""
        devices = 1 + max(device for (device,) in self.placement)
        return [[stage for stage, (home,) in enumerate(self.placement) if home == device] for device in range(devices)]

    @property
    def devices(self) -> int:
        """p."""
        return len(self.stages)

    @functools.cached_property
    def chunks(self) -> int:
        """v, the stages of a device."""
        return len(self.stages[0])

    @functools.cached_property
    def seconds(self) -> list[list[float]]:
        """For each device, what each letter takes."""
        kinds = self.forward, self.input_grad, self.weight_grad
        return [[kind[stage] for kind in kinds for stage in own] for own in self.stages]

    @functools.cached_property
    def sources(self) -> list[list[tuple[int, int, float] | None]]:
        """For each device and each F and I: the device and the letter that it waits for, and the delay between."""
        last, v = len(self.placement) - 1, self.chunks

        def source(kind: Kind, stage: int) -> tuple[int, int, float] | None:
            if kind is Kind.F and stage == 0:
                return None
            made, before = (Kind.F, stage - 1) if kind is Kind.F else (Kind.I, stage + 1)
            if kind is Kind.I and stage == last:
                made, before = Kind.F, last
            (here,), (there,) = self.placement[stage], self.placement[before]
            return there, made * v + self.stages[there].index(before), 0.0 if there == here else self.transfer

        return [[source(kind, stage) for kind in (Kind.F, Kind.I) for stage in own] for own in self.stages]

    @functools.cached_property
    def targets(self) -> list[list[list[tuple[int, int, float]]]]:
        """For each device and each F and I: who waits for it, in the form of :attr:`sources`."""
        found: list[list[list[tuple[int, int, float]]]] = [[[] for _ in own] for own in self.sources]
        for device, own in enumerate(self.sources):
            for letter, source in enumerate(own):
                if source is not None:
                    found[source[0]][source[1]].append((device, letter, source[2]))
        return found

    @functools.cached_property
    def changes(self) -> list[float]:
        """What each letter adds to the memory that is held."""
        return [change for change in (1.0, self.deferred - 1.0, -self.deferred) for _ in range(self.chunks)]

    @functools.cached_property
    def work(self) -> list[float]:
        """The seconds of all of a device's tasks."""
        return [self.microbatches * sum(own) for own in self.seconds]

    @functools.cached_property
    def bound(self) -> float:
        """No order is faster: a device works without a break as of the first arrival."""
        arrivals = [0.0]
        for stage, (near, far) in enumerate(itertools.pairwise(self.placement)):
            arrivals.append(arrivals[-1] + self.forward[stage] + (0.0 if near == far else self.transfer))
        return max(arrivals[own[0]] + work for own, work in zip(self.stages, self.work, strict=True))

    def peak(self, words: Sequence[Word]) -> float:
        """The most that a device holds at once."""
        return max(max(itertools.accumulate(self.changes[letter] for letter in word)) for word in words)

    def fits(self, held: float) -> bool:
        """Whether ``held`` is within the memory, up to rounding."""
        return held <= self.memory + 1e-9


def to_schedule(problem: Problem, words: Sequence[Word]) -> Schedule:
    """The schedule that the words say."""
    orders = []
    for own, word in zip(problem.stages, words, strict=True):
        counters = [itertools.count() for _ in range(3 * problem.chunks)]
        split = (divmod(letter, problem.chunks) for letter in word)
        orders.append(
            tuple(
                Task(Kind(kind), own[chunk], next(counters[letter]))
                for letter, (kind, chunk) in zip(word, split, strict=True)
            )
        )
    return Schedule(problem.placement, tuple(orders), problem.microbatches)


def to_words(problem: Problem, schedule: Schedule) -> list[Word]:
    """The words of a schedule with F, I and W on the same placement."""
    return [
        [task.kind * problem.chunks + own.index(task.stage) for task in order]
        for own, order in zip(problem.stages, schedule.orders, strict=True)
    ]


class Run:
    """The words, timed: each task runs as soon as its device and its input are there.

    Attributes:
        cost: of the words; :data:`IMPOSSIBLE` where they deadlock, or are found to take longer than ``limit``.
        ends: for each device the ends of each letter's tasks.
    """

    def __init__(self, problem: Problem, words: Sequence[Word], limit: float = math.inf) -> None:
        self.problem, self.words = problem, list(words)
        self.ends: list[list[list[float]]] = [[[] for _ in range(3 * problem.chunks)] for _ in words]
        self.cost = self._run(limit)

    def _run(self, limit: float) -> Cost:
        problem, words, ends = self.problem, self.words, self.ends
        weights = 2 * problem.chunks  # from here on, letters are W
        slack = [limit - work + 1e-9 for work in problem.work]
        clocks, idle, positions = [0.0] * len(words), [0.0] * len(words), [0] * len(words)
        waiting: list[list[int]] = [[] for _ in words]  # for each device, those that wait for it
        runnable = list(range(len(words)))[::-1]
        while runnable:
            d = runnable.pop()
            clock, own, seconds, sources = clocks[d], ends[d], problem.seconds[d], problem.sources[d]
            begun = positions[d]
            for position in range(begun, len(words[d])):
                letter = words[d][position]
                if letter < weights:
                    source = sources[letter]
                    if source is not None:
                        made, number = ends[source[0]][source[1]], len(own[letter])
                        if len(made) <= number:
                            positions[d] = position
                            waiting[source[0]].append(d)
                            break
                        arrival = made[number] + source[2]
                        if arrival > clock:
                            idle[d] += arrival - clock
                            if idle[d] > slack[d]:
                                return IMPOSSIBLE
                            clock = arrival
                clock += seconds[letter]
                own[letter].append(clock)
            else:
                positions[d] = len(words[d])
            clocks[d] = clock
            if positions[d] > begun:
                runnable += waiting[d]
                waiting[d] = []
        if any(position < len(word) for position, word in zip(positions, words, strict=True)):
            return IMPOSSIBLE
        firsts = (own[word[0]][0] - own_seconds[word[0]] for own, word, own_seconds in zip(ends, words, problem.seconds))
        return max(clocks), max(clock - first for clock, first in zip(clocks, firsts, strict=True)), sum(clocks)

    @property
    def tasks(self) -> int:
        """How many tasks were timed."""
        return sum(len(times) for own in self.ends for times in own)

    @functools.cached_property
    def timed(self) -> list[list[tuple[int, float]]]:
        """For each device and place in its word: how many of the same letter come before, and the task's end."""
        found = []
        for word, ends in zip(self.words, self.ends, strict=True):
            counters = [itertools.count() for _ in ends]
            numbers = [next(counters[letter]) for letter in word]
            found.append([(number, ends[letter][number]) for letter, number in zip(word, numbers, strict=True)])
        return found

    @functools.cached_property
    def held(self) -> list[list[float]]:
        """For each device what it holds before each place of its word, and at the end."""
        changes = self.problem.changes
        return [list(itertools.accumulate((changes[letter] for letter in word), initial=0.0)) for word in self.words]
