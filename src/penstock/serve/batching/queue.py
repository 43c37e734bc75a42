"""Who waits, in the order in which they go in: by priority, then fairly among keys, then by arrival."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

from penstock.serve.sequence import Sequence


class FairQueue:
    """Waiting sequences. Within a priority, the key that has been given the fewest tokens goes first; a key that
    comes back after a pause starts level with the least of those that wait, so that it cannot hoard its turn
    (virtual token counters, Sheng et al. 2024). Adding and popping cost the logarithm of the number of keys.
    """

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], deque[Sequence]] = {}
        self._heap: list[tuple[int, float, int, str]] = []
        self._spent: dict[str, float] = {}
        self._level: dict[int, float] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sequence: Sequence) -> None:
        """Puts ``sequence`` behind the others of its key, or before them if it ran before."""
        priority, key = sequence.request.priority, sequence.request.key
        line = self._lines.get((priority, key))
        if line is None:
            line = self._lines[priority, key] = deque()
            self._spent[key] = max(self._spent.get(key, 0.0), self._level.get(priority, 0.0))
            heappush(self._heap, (priority, self._spent[key], sequence.arrival, key))
        if sequence.preempted:
            line.appendleft(sequence)
        else:
            line.append(sequence)
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes ``sequence`` out, wherever it stands."""
        name = (sequence.request.priority, sequence.request.key)
        self._lines[name].remove(sequence)
        self._count -= 1

    def first(self) -> Sequence | None:
        """The sequence that is next; it stays in the queue."""
        while self._heap:
            priority, spent, _, key = self._heap[0]
            line = self._lines[priority, key]
            if not line:
                heappop(self._heap)
                del self._lines[priority, key]
            elif spent < self._spent[key]:
                # The key was served under another priority meanwhile.
                heappop(self._heap)
                heappush(self._heap, (priority, self._spent[key], line[0].arrival, key))
            else:
                self._level[priority] = spent
                return line[0]
        return None

    def pop(self) -> Sequence:
        """Takes out the sequence that :meth:`first` names, and charges its key for it."""
        sequence = self.first()
        if sequence is None:
            raise IndexError("nobody waits")
        priority, _, _, key = heappop(self._heap)
        line = self._lines[priority, key]
        line.popleft()
        self._count -= 1
        if not sequence.preempted:
            self._spent[key] += sequence.limit
        if line:
            heappush(self._heap, (priority, self._spent[key], line[0].arrival, key))
        else:
            del self._lines[priority, key]
        return sequence
