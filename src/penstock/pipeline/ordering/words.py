"""Orders as words: each device's tasks, without their microbatches.

Where all microbatches pass the same stages, they are alike: each device may take them in turn for each stage and kind,
without loss, since exchanging two of them changes no time and no memory. What is left to choose is one word for each
device, over the letters F, I and W of each of its stages. Where backwards are whole, I stands for B, and there is no W.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from penstock.pipeline.ir.schedule import Kind, Placement, Schedule, Task

#: A device's letters in order. A letter is v times a kind (F, I or W) plus the number of one of its v stages, or of one
#: of the replicas of stages that it has.
Word = list[int]
#: Makespan, longest span of a device, and the sum of ends, by which a search sees its way on plateaus.
Cost = tuple[float, float, float]

IMPOSSIBLE: Cost = (math.inf, math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A pipeline to be ordered, each device of which has v stages or replicas of stages.

    Attributes:
        placement: the devices of each stage; microbatches take its replicas in turn.
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

    @classmethod
    def whole(cls, placement: Placement, memory: float, microbatches: int) -> Problem:
        """One of F = 1 and B = 2 of a stage, without W."""
        each = len(placement)
        return cls(placement, (1.0,) * each, (2.0,) * each, (0.0,) * each, 0.0, memory, 0.0, microbatches)

    @functools.cached_property
    def stages(self) -> list[list[tuple[int, int]]]:
        """For each device its (stage, replica), from the first to the last."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(1 + max(map(max, self.placement)))]
        for stage, devices in enumerate(self.placement):
            for replica, device in enumerate(devices):
                found[device].append((stage, replica))
        return found

    @property
    def replicas(self) -> int:
        """Of each stage."""
        return len(self.placement[0])

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
        return [[kind[stage] for kind in kinds for stage, _ in own] for own in self.stages]

    @functools.cached_property
    def sources(self) -> list[list[tuple[int, int, float] | None]]:
        """For each device and each F and I: the device and the letter that it waits for, and the delay between."""
        last, v = len(self.placement) - 1, self.chunks

        def source(kind: Kind, stage: int, replica: int) -> tuple[int, int, float] | None:
            if kind is Kind.F and stage == 0:
                return None
            made, before = (Kind.F, stage - 1) if kind is Kind.F else (Kind.I, stage + 1)
            if kind is Kind.I and stage == last:
                made, before = Kind.F, last
            here, there = self.placement[stage][replica], self.placement[before][replica]
            delay = 0.0 if there == here else self.transfer
            return there, made * v + self.stages[there].index((before, replica)), delay

        return [[source(kind, *home) for kind in (Kind.F, Kind.I) for home in own] for own in self.stages]

    @functools.cached_property
    def changes(self) -> list[float]:
        """What each letter adds to the memory that is held."""
        return [change for change in (1.0, self.deferred - 1.0, -self.deferred) for _ in range(self.chunks)]

    @functools.cached_property
    def work(self) -> list[float]:
        """The seconds of all of a device's tasks."""
        counts = [len(range(replica, self.microbatches, self.replicas)) for replica in range(self.replicas)]
        kinds = self.forward, self.input_grad, self.weight_grad
        return [sum(counts[r] * kind[stage] for kind in kinds for stage, r in own) for own in self.stages]

    @functools.cached_property
    def bound(self) -> float:
        """No order is faster: a device works without a break as of the first arrival."""
        arrivals = [[0.0] * self.replicas]
        for stage, (near, far) in enumerate(itertools.pairwise(self.placement)):
            ways = (0.0 if here == there else self.transfer for here, there in zip(near, far, strict=True))
            arrivals.append(
                [arrival + self.forward[stage] + way for arrival, way in zip(arrivals[-1], ways, strict=True)]
            )
        first = (min(arrivals[stage][replica] for stage, replica in own) for own in self.stages)
        return max(arrival + work for arrival, work in zip(first, self.work, strict=True))

    def peak(self, words: Sequence[Word]) -> float:
        """The most that a device holds at once."""
        return max(max(itertools.accumulate(self.changes[letter] for letter in word)) for word in words)

    def fits(self, held: float) -> bool:
        """Whether ``held`` is within the memory, up to rounding."""
        return held <= self.memory + 1e-9


def to_schedule(problem: Problem, words: Sequence[Word]) -> Schedule:
    """The schedule that the words say; without W, backwards are whole."""
    split = any(letter >= 2 * problem.chunks for word in words for letter in word)
    kinds = (Kind.F, Kind.I, Kind.W) if split else (Kind.F, Kind.B)
    orders = []
    for own, word in zip(problem.stages, words, strict=True):
        counters = [itertools.count(replica, problem.replicas) for _ in kinds for _, replica in own]
        order = []
        for letter in word:
            kind, home = divmod(letter, problem.chunks)
            stage, replica = own[home]
            order.append(Task(kinds[kind], stage, next(counters[letter]), replica))
        orders.append(tuple(order))
    return Schedule(problem.placement, tuple(orders), problem.microbatches)


def to_words(problem: Problem, schedule: Schedule) -> list[Word]:
    """The words of a schedule on the same placement whose devices take microbatches in turn."""
    places = {Kind.F: 0, Kind.I: 1, Kind.B: 1, Kind.W: 2}
    return [
        [places[task.kind] * problem.chunks + own.index((task.stage, task.replica)) for task in order]
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
        firsts = (
            own[word[0]][0] - times[word[0]] for own, word, times in zip(ends, words, problem.seconds, strict=True)
        )
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
