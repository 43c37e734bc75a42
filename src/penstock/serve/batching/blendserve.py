"""Blending of what is short of compute with what is short of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import ClassVar

from penstock.policy import policy
from penstock.serve.batching.contract import Batcher, Batching, Room
from penstock.serve.batching.prefix_tree import Branch, grow
from penstock.serve.batching.stall_free import go_on
from penstock.serve.batching.waves import WavesBatcher
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.sequence import Sequence


@dataclasses.dataclass
class Demand:
    """What sequences ask of a device: ``compute``, the tokens that go through the weights, and ``memory``, the cached
    tokens that their decoding reads. What one of each costs does not matter for an order by their ratio."""

    compute: float = 0.0
    memory: float = 0.0

    def add(self, other: Demand) -> None:
        """Takes in what ``other`` asks for."""
        self.compute += other.compute
        self.memory += other.memory

    @property
    def density(self) -> float:
        """Compute for each unit of memory."""
        return self.compute / self.memory

    def denser(self, other: Demand) -> bool:
        """Whether there is more compute for each unit of memory than in ``other``; either may be empty."""
        return self.compute * other.memory > other.compute * self.memory


def demand_of(sequence: Sequence, shared: int = 0) -> Demand:
    """What ``sequence`` asks for, if ``shared`` of its tokens are computed already. The prompt is computed once; each
    decoded token is computed, and reads all that are before it."""
    prompt, decoded = sequence.prompt, sequence.limit - sequence.prompt
    return Demand(prompt - shared + decoded, decoded * (prompt + decoded / 2))


class BlendServeBatcher(WavesBatcher):
    """See :class:`BlendServe`."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(self._plan)
        self._size = limits.block_size
        self._wave, self._begun = Demand(), Demand()

    def form(self, running: List[Sequence], room: Room) -> None:
        go_on(running, room)
        while room.tokens and (chosen := self._scan()) is not None and room.take(chosen):
            self._waves.remove(chosen)
            if not chosen.preempted:
                self._begun.add(demand_of(chosen, chosen.cached))

    def _scan(self) -> Sequence | None:
        """The sequence at that end of the wave which brings what has begun nearer to the density of the whole."""
        front = self._waves.first()  # before all else, since it may begin a wave
        return self._waves.first(last=True) if self._begun.denser(self._wave) else front

    def _plan(self, sequences: List[Sequence]) -> Iterator[Sequence]:
        """``sequences`` depth first over the prefix tree, what grows from a branch by falling density."""
        demands: dict[Branch | Sequence, Demand] = {}
        for branch in grow(sequences, self._size):
            total = demands[branch] = Demand(branch.depth - branch.above)
            for child in branch.children:
                if not isinstance(child, Branch):
                    demands[child] = demand_of(child, branch.depth)
                total.add(demands[child])
            branch.children.sort(key=lambda child: demands[child].density, reverse=True)
        self._wave, self._begun = total, Demand()
        return branch.walk()


@policy("serve.batching", "blendserve", papers=[230])
class BlendServe(Batching):
    """Requests that need much compute and requests that read much memory are admitted together, from the two ends of
    the prefix tree, ordered by what its branches need (BlendServe). For work that is known beforehand; see
    :class:`~.waves.Waves` for what arrives later.

    From the paper: the resource-aware prefix tree, whose order keeps each shared prefix in one piece, and the scan
    from both ends. Ours: the next sequence comes from the end that brings the density of what has begun nearer to that
    of all; ``max_tokens`` stands for the number of decoded tokens; branches are never split to blend better. How
    well the two overlap within a step is for the token budget to say: one that a prompt fills leaves nothing to blend.
    """

    fair: ClassVar[bool] = False

    def start(self, limits: Limits) -> Batcher:
        return BlendServeBatcher(limits)
