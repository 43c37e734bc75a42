"""Search for the order of F, I and W on each device of a pipeline with one stage a device.

Microbatches are alike, so each device may take them in turn for each kind without loss: exchanging two of them changes
no time and no memory. What is left to choose is one word over F, I and W for each device.

From the zero-bubble paper: the greedy scheduler (forwards of the warm-up up to the memory limit, then F and I in turns,
W in gaps and where memory is full), its binary choices, and the grid search over them. Ours: the bounds on microbatches
in flight in place of its choice to skip an F, the plain "fill every gap" in place of its count of cumulative bubbles,
and the local search over the words at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Iterator

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped

Word = list[Kind]
#: Makespan, longest span of a device, and the sum of ends, by which the local search sees its way on plateaus.
Cost = tuple[float, float, float]

#: Tasks that the grid search may place, and that the local search may time from each of its starts.
GREEDY_TASKS = 150_000
LOCAL_TASKS = 200_000
LOCAL_STARTS = 3
#: How many places the local search moves a task at once.
REACH = 6

_F, _I, _W = Kind.F, Kind.I, Kind.W


@dataclasses.dataclass(frozen=True)
class Problem:
    """A pipeline to be ordered.

    Attributes:
        forward, input_grad, weight_grad: seconds of F, I and W for each stage.
        transfer: seconds between neighbours.
        memory: the activations of one microbatch on a stage that a device may hold at once, 1 or more.
        deferred: of an activation, the share that I leaves for W.
        microbatches: m.
    """

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    transfer: float
    memory: float
    deferred: float
    microbatches: int

    @property
    def devices(self) -> int:
        """p."""
        return len(self.forward)

    @functools.cached_property
    def durations(self) -> tuple[tuple[float, ...], ...]:
        """Seconds of F, I and W."""
        return self.forward, self.input_grad, self.weight_grad

    @functools.cached_property
    def changes(self) -> tuple[float, ...]:
        """What F, I and W add to the memory that is held."""
        return 1.0, self.deferred - 1.0, -self.deferred

    @property
    def bound(self) -> float:
        """No order is faster: a device works without a break as of the first arrival."""
        arrival = latest = 0.0
        for f, i, w in zip(*self.durations, strict=True):
            latest = max(latest, arrival + self.microbatches * (f + i + w))
            arrival += f + self.transfer
        return latest

    def fits(self, held: float) -> bool:
        """Whether ``held`` is within the memory, up to rounding."""
        return held <= self.memory + 1e-9


@dataclasses.dataclass(frozen=True)
class Choices:
    """One point of the grid.

    Attributes:
        in_flight: for each device, the most microbatches between F and I.
        fill: put a W into a gap that is shorter than it.
        extend: in the warm-up, run an F even where it delays the first I.
        alternate: after an I, prefer an F to the next I.
    """

    in_flight: tuple[int, ...]
    fill: bool
    extend: bool
    alternate: bool


def search(problem: Problem) -> Schedule:
    """The best schedule found for ``problem`` within its memory, by makespan."""
    words = best_words(problem)
    orders = []
    for device, word in enumerate(words):
        counters = {kind: itertools.count() for kind in (_F, _I, _W)}
        orders.append(tuple(Task(kind, device, next(counters[kind])) for kind in word))
    return Schedule(looped(problem.devices), tuple(orders), problem.microbatches)


def best_words(problem: Problem) -> list[Word]:
    """The best of the grid, after a local search from the best few; the latter only where it is small enough."""
    tasks = 3 * problem.devices * problem.microbatches
    found: list[tuple[Cost, list[Word]]] = []
    for choices in itertools.islice(_grid(problem), max(1, GREEDY_TASKS // tasks)):
        words = _Greedy(problem, choices).run()
        if all(words != known for _, known in found):
            found.append((cost(problem, words), words))
        if found[-1][0][0] <= problem.bound:
            return words
    found.sort(key=lambda pair: pair[0])
    evaluations = LOCAL_TASKS // tasks
    if evaluations >= tasks:  # fewer would not try one move of each task
        found = [_improve(problem, words, evaluations) for _, words in found[:LOCAL_STARTS]]
    return min(found, key=lambda pair: pair[0])[1]


def cost(problem: Problem, words: list[Word]) -> Cost:
    """What the words cost; infinite where they deadlock."""
    p, transfer = problem.devices, problem.transfer
    forwards: list[list[float]] = [[] for _ in words]  # ends of F of each device
    backwards: list[list[float]] = [[] for _ in words]  # ends of I
    clocks, positions, runnable = [0.0] * p, [0] * p, list(range(p))[::-1]
    while runnable:
        d = runnable.pop()
        word, clock, done = words[d], clocks[d], positions[d]
        ends = forwards[d], backwards[d]
        sources = forwards[d - 1] if d else None, backwards[d + 1] if d < p - 1 else None
        f, i, w = (times[d] for times in problem.durations)
        while done < len(word):
            kind = word[done]
            if kind is _W:
                clock += w
            else:
                own, source = ends[kind], sources[kind]
                if source is not None:
                    if len(source) <= len(own):
                        break
                    clock = max(clock, source[len(own)] + transfer)
                clock += f if kind is _F else i
                own.append(clock)
            done += 1
        if done > positions[d]:
            runnable += [near for near in (d - 1, d + 1) if 0 <= near < p and near not in runnable]
        clocks[d], positions[d] = clock, done
    if any(done < len(word) for done, word in zip(positions, words, strict=True)):
        return math.inf, math.inf, math.inf
    spans = (clock - ends[0] + f for clock, ends, f in zip(clocks, forwards, problem.forward, strict=True))
    return max(clocks), max(spans), sum(clocks)


def _grid(problem: Problem) -> Iterator[Choices]:
    """All choices, the more promising for long pipelines first; bounds as in ZB-H2, as in 1F1B, and by memory alone."""
    p = problem.devices
    bounds = (
        tuple(2 * (p - device) - 1 for device in range(p)),
        tuple(p - device for device in range(p)),
        (problem.microbatches,) * p,
    )
    for alternate, extend, in_flight, fill in itertools.product((True, False), (True, False), bounds, (False, True)):
        yield Choices(in_flight, fill, extend, alternate)


class _Greedy:
    """One run of the greedy scheduler: a device decides when it gets free, and whenever an input arrives.

    What a device knows of arrivals is what its neighbours have begun to send by then.
    """

    def __init__(self, problem: Problem, choices: Choices) -> None:
        devices = range(problem.devices)
        self.problem, self.choices = problem, choices
        self.words: list[Word] = [[] for _ in devices]
        self.arrived: tuple[list[list[float]], list[list[float]]] = ([[] for _ in devices], [[] for _ in devices])
        self.arrived[_F][0] = [0.0] * problem.microbatches
        self.counts = [[0, 0, 0] for _ in devices]
        self.held = [0.0] * problem.devices
        self.free = [0.0] * problem.devices
        self.events = [(0.0, device) for device in devices]

    def run(self) -> list[Word]:
        """The words."""
        for _ in range(3 * self.problem.devices * self.problem.microbatches):
            kind = None
            while kind is None:
                time, device = heapq.heappop(self.events)
                if time >= self.free[device]:
                    kind = self._choose(device, time)
            self._perform(device, kind, time)
        return self.words

    def _choose(self, device: int, time: float) -> Kind | None:
        """What ``device`` begins at ``time``; None where it waits for the next event."""
        forwards, backwards, weights = self.counts[device]
        next_f, next_i = math.inf, math.inf
        roomy = self.problem.fits(self.held[device] + 1)
        if roomy and forwards - backwards < self.choices.in_flight[device]:
            next_f = _item(self.arrived[_F][device], forwards)
        if backwards < forwards:
            next_i = _item(self.arrived[_I][device], backwards)
        if next_i <= time:
            if next_f <= time and (self._forward_first(device) if backwards else self.choices.extend):
                return _F
            return _I
        delays = not backwards and time + self.problem.forward[device] > next_i
        if next_f <= time and (self.choices.extend or not delays):
            return _F
        if weights < backwards:
            gap = min(next_f, next_i) - time
            if self.choices.fill or gap >= self.problem.weight_grad[device] or gap == math.inf:
                return _W
        return None

    def _forward_first(self, device: int) -> bool:
        """Whether the last F or I was an I, and they alternate."""
        return self.choices.alternate and next(kind for kind in reversed(self.words[device]) if kind is not _W) is _I

    def _perform(self, device: int, kind: Kind, time: float) -> None:
        end = time + self.problem.durations[kind][device]
        self.free[device] = end
        self.words[device].append(kind)
        self.counts[device][kind] += 1
        self.held[device] += self.problem.changes[kind]
        heapq.heappush(self.events, (end, device))
        if kind is _W:
            return
        target, arrival = device + (1 if kind is _F else -1), end + self.problem.transfer
        if target == self.problem.devices:  # the last stage turns around by itself
            target, arrival, kind = device, end, _I
        if target >= 0:
            self.arrived[kind][target].append(arrival)
            heapq.heappush(self.events, (arrival, target))


def _item(times: list[float], index: int) -> float:
    return times[index] if index < len(times) else math.inf


def _improve(problem: Problem, words: list[Word], evaluations: int) -> tuple[Cost, list[Word]]:
    """Hill climbing: moves one task of one device a few places, as long as that lowers the cost."""
    words = [list(word) for word in words]
    best = cost(problem, words)
    moved = True
    while moved:
        moved = False
        for device, source, target in _moves(problem):
            word = words[device]
            if word[source] is word[target]:
                continue
            if evaluations <= 0:
                return best, words
            words[device] = changed = list(word)
            changed.insert(target, changed.pop(source))
            if _possible(problem, changed):
                evaluations -= 1
                found = cost(problem, words)
                if found < best:
                    best, moved = found, True
                    continue
            words[device] = word
    return best, words


def _moves(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """(device, from, to) of all moves of the local search."""
    length = 3 * problem.microbatches
    for device, source, way in itertools.product(range(problem.devices), range(length), range(1, REACH + 1)):
        if source + way < length:
            yield device, source, source + way
            yield device, source + way, source


def _possible(problem: Problem, word: Word) -> bool:
    """Whether F comes before I before W, and memory suffices."""
    counts, held = [0, 0, 0], 0.0
    for kind in word:
        counts[kind] += 1
        held += problem.changes[kind]
        if counts[_W] > counts[_I] or counts[_I] > counts[_F] or not problem.fits(held):
            return False
    return True
