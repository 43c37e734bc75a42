"""Who waits, in the order in which they go in: by priority, then fairly among keys, then by arrival."""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush

from penstock.serve.engine.sequence import Sequence

#: The turn of a line: its priority, what its key has been given so far, arrival of its first sequence, its key.
Turn = tuple[int, float, int, str]


class FairQueue:
    """Waiting sequences. Within a priority, the key that has been given the fewest tokens goes first; a key that
    comes back after a pause starts level with the least of those that wait, so that it cannot hoard its turn
    (virtual token counters, Sheng et al. 2024; ours: a sequence is charged, when it goes in, with the most tokens that
    it can come to). Every operation costs at most the logarithm of the number of keys, however many sequences wait.
    """

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], OrderedDict[int, Sequence]] = {}
        self._turns: dict[tuple[int, str], Turn] = {}
        self._heap: list[Turn] = []
        self._spent: dict[str, float] = {}
        self._level: dict[int, float] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sequence: Sequence) -> None:
        """Puts ``sequence`` behind the others of its key, or before them if it ran before."""
        name = priority, key = sequence.request.priority, sequence.request.key
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = OrderedDict()
            self._spent[key] = max(self._spent.get(key, 0.0), self._level.get(priority, 0.0))
        line[sequence.arrival] = sequence
        if sequence.preempted:
            line.move_to_end(sequence.arrival, last=False)
        self._count += 1
        if len(line) == 1:
            self._enter(name)

    def remove(self, sequence: Sequence) -> None:
        """Takes ``sequence`` out, wherever it stands."""
        name = sequence.request.priority, sequence.request.key
        line = self._lines[name]
        del line[sequence.arrival]
        self._count -= 1
        if not line:
            del self._lines[name], self._turns[name]

    def first(self) -> Sequence | None:
        """The sequence that is next; it stays in the queue."""
        while self._heap:
            turn = priority, spent, _, key = self._heap[0]
            name = priority, key
            if self._turns.get(name) is not turn:
                heappop(self._heap)  # of a line that has ended, or has a later turn
            elif spent < self._spent[key]:
                heappop(self._heap)  # the key was served under another priority meanwhile
                self._enter(name)
            else:
                self._level[priority] = spent
                return next(iter(self._lines[name].values()))
        return None

    def pop(self) -> Sequence:
        """Takes out the sequence that :meth:`first` names, and charges its key for it, once for all its time."""
        sequence = self.first()
        if sequence is None:
            raise IndexError("nobody waits")
        name = _, key = sequence.request.priority, sequence.request.key
        if not sequence.preempted:
            self._spent[key] += sequence.limit
        self.remove(sequence)
        if name in self._lines:
            self._enter(name)
        return sequence

    def _enter(self, name: tuple[int, str]) -> None:
        """Gives a line its turn."""
        priority, key = name
        turn = priority, self._spent[key], next(iter(self._lines[name])), key
        self._turns[name] = turn
        heappush(self._heap, turn)


class QueueBatcher:
    """What batchers have in common whose waiting sequences stand in a :class:`FairQueue`."""

    def __init__(self) -> None:
        self._queue = FairQueue()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def add(self, sequence: Sequence) -> None:
        self._queue.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
