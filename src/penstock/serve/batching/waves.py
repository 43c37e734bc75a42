"""Who waits, where the whole of the work counts and not who came first: planned in waves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List

from penstock.serve.engine.sequence import Sequence

#: Puts the sequences of a wave, none or more, into an order.
Plan = Callable[[List[Sequence]], Iterable[Sequence]]


class Waves:
    """Waiting sequences in the order of a plan. A wave is all that wait at the most urgent priority when it begins;
    what comes later is for the waves after it, so that nobody is overtaken without end by his equals. Keys are not
    told from each other. Sequences that lost their memory go before the wave.

    A sequence is planned once, and every other operation takes constant time.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._arrived: dict[int, dict[int, Sequence]] = {}
        self._wave: OrderedDict[int, Sequence] = OrderedDict()
        self._returned: OrderedDict[int, Sequence] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sequence: Sequence) -> None:
        """Puts ``sequence`` into a later wave, or before this one if it ran before."""
        self._count += 1
        if sequence.preempted:
            self._returned[sequence.arrival] = sequence
            self._returned.move_to_end(sequence.arrival, last=False)
        else:
            self._arrived.setdefault(sequence.request.priority, {})[sequence.arrival] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Takes ``sequence`` out, wherever it stands."""
        self._count -= 1
        arrived = self._arrived.get(sequence.request.priority, {})
        home = next(part for part in (self._returned, self._wave, arrived) if sequence.arrival in part)
        del home[sequence.arrival]

    def first(self, *, last: bool = False) -> Sequence | None:
        """The sequence at the front of the wave, or at its end; it stays. Begins the next wave where one is over."""
        if self._returned:
            return next(iter(self._returned.values()))
        while not self._wave and self._arrived:
            arrived = self._arrived.pop(min(self._arrived))
            self._wave.update((each.arrival, each) for each in self._plan(list(arrived.values())))
        return next((reversed if last else iter)(self._wave.values()), None)


class WavesBatcher:
    """What batchers have in common whose waiting sequences stand in :class:`Waves`."""

    def __init__(self, plan: Plan) -> None:
        self._waves = Waves(plan)

    @property
    def waiting(self) -> int:
        return len(self._waves)

    def add(self, sequence: Sequence) -> None:
        self._waves.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._waves.remove(sequence)
