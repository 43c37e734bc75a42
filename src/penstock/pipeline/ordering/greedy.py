"""A greedy scheduler of F, I and W in simulated time, and the grid of its choices.

From the zero-bubble paper: forwards of the warm-up up to the memory limit, then F and I in turns, W in gaps and where
memory is full, and the grid search over binary choices. Ours: the bounds on microbatches in flight in place of its
choice to skip an F, the plain "fill every gap" in place of its count of cumulative bubbles, and several stages on a
device.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator

from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.ordering.words import Problem, Word


@dataclasses.dataclass(frozen=True)
class Choices:
    """One point of the grid.

    Attributes:
        in_flight: for each device, the most activations between F and I.
        fill: put a W into a gap that is shorter than it.
        extend: in the warm-up, run an F even where it delays the first I.
        alternate: after an I, prefer an F to the next I.
    """

    in_flight: tuple[int, ...]
    fill: bool
    extend: bool
    alternate: bool


def grid(problem: Problem) -> Iterator[list[Word]]:
    """The words of all choices, the more promising for long pipelines first; bounds as in ZB-H2, as in 1F1B, and by
    memory alone."""
    p, v = problem.devices, problem.chunks
    bounds = (
        tuple(v * (2 * (p - device) - 1) for device in range(p)),
        tuple(v * (p - device) for device in range(p)),
        (v * problem.microbatches,) * p,
    )
    for alternate, extend, in_flight, fill in itertools.product((True, False), (True, False), bounds, (False, True)):
        yield _Greedy(problem, Choices(in_flight, fill, extend, alternate)).run()


class _Greedy:
    """One run: a device decides when it gets free, and whenever an input arrives.

    What a device knows of arrivals is what its neighbours have begun to send by then. The oldest microbatch that a
    device is not done with always finds memory on it, so nobody waits for memory for ever.
    """

    def __init__(self, problem: Problem, choices: Choices) -> None:
        devices = range(problem.devices)
        self.problem, self.choices = problem, choices
        self.words: list[Word] = [[] for _ in devices]
        self.arrived: list[list[list[float]]] = [[[] for _ in range(2 * problem.chunks)] for _ in devices]
        first = problem.placement[0][0]
        self.arrived[first][problem.stages[first].index(0)] = [0.0] * problem.microbatches
        self.counts = [[0] * (3 * problem.chunks) for _ in devices]
        self.held = [0.0] * problem.devices
        self.free = [0.0] * problem.devices
        self.events = [(0.0, device) for device in devices]

    def run(self) -> list[Word]:
        """The words."""
        for _ in range(sum(3 * self.problem.chunks for _ in self.words) * self.problem.microbatches):
            letter = None
            while letter is None:
                time, device = heapq.heappop(self.events)
                if time >= self.free[device]:
                    letter = self._choose(device, time)
            self._perform(device, letter, time)
        return self.words

    def _choose(self, device: int, time: float) -> int | None:
        """What ``device`` begins at ``time``; None where it waits for the next event."""
        counts, v = self.counts[device], self.problem.chunks
        arrived = self.arrived[device]
        forwards = [(_item(arrived[c], counts[c]), counts[c], -c) for c in range(v) if self._admits(device, c)]
        backwards = [(_item(arrived[v + c], counts[v + c]), counts[v + c], -c) for c in range(v)]
        next_f, next_i = (min((arrival for arrival, *_ in each), default=math.inf) for each in (forwards, backwards))
        ready_f, ready_i = ([own[1:] for own in each if own[0] <= time] for each in (forwards, backwards))
        begun = any(counts[v : 2 * v])
        f, i = (-min(each)[1] if each else 0 for each in (ready_f, ready_i))
        if ready_i:
            if ready_f and (self._forward_first(device) if begun else self.choices.extend):
                return f
            return v + i
        if ready_f:
            delays = not begun and time + self.problem.seconds[device][f] > next_i
            if self.choices.extend or not delays:
                return f
        w = min((counts[2 * v + c], -c) for c in range(v) if counts[2 * v + c] < counts[v + c])[1] if any(
            counts[2 * v + c] < counts[v + c] for c in range(v)
        ) else None
        if w is not None:
            letter = 2 * v - w
            gap = min(next_f, next_i) - time
            if self.choices.fill or gap >= self.problem.seconds[device][letter] or gap == math.inf:
                return letter
        return None

    def _admits(self, device: int, chunk: int) -> bool:
        """Whether there is memory for the next F of that stage of the device."""
        counts, v = self.counts[device], self.problem.chunks
        oldest = min(counts[2 * v :])
        if counts[chunk] == oldest:
            return self.problem.fits(self.held[device] + 1)
        if sum(counts[:v]) - sum(counts[v : 2 * v]) >= self.choices.in_flight[device]:
            return False
        missing = sum(counts[c] == oldest for c in range(v))
        return self.problem.fits(self.held[device] + 1 + missing)

    def _forward_first(self, device: int) -> bool:
        """Whether the last F or I was an I, and they alternate."""
        v = self.problem.chunks
        return self.choices.alternate and next(x for x in reversed(self.words[device]) if x < 2 * v) >= v

    def _perform(self, device: int, letter: int, time: float) -> None:
        end = time + self.problem.seconds[device][letter]
        self.free[device] = end
        self.words[device].append(letter)
        self.counts[device][letter] += 1
        self.held[device] += self.problem.changes[letter]
        heapq.heappush(self.events, (end, device))
        if letter < 2 * self.problem.chunks:
            for target, waiting, delay in self.problem.targets[device][letter]:
                self.arrived[target][waiting].append(end + delay)
                heapq.heappush(self.events, (end + delay, target))


def _item(times: list[float], index: int) -> float:
    return times[index] if index < len(times) else math.inf
