"""Nano-batches: how a serving step is split so that a device is busy with compute and with memory at the same time.

A part of a step is a chain of operations, over all layers. Each operation holds the one resource that it is short of,
and operations of different parts run at the same time where they hold different ones (NanoFlow). Splitting is not free:
each part reads all the weights.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field, PositiveFloat

from penstock.core.config import Config
from penstock.models.config import DecoderConfig


class Resource(enum.Enum):
    """What one operation at a time can have."""

    COMPUTE = enum.auto()
    MEMORY = enum.auto()
    NETWORK = enum.auto()


class Operation(NamedTuple):
    """A piece of work that holds ``resource`` for ``seconds``, where nothing else runs beside it."""

    resource: Resource
    seconds: float


#: The operations of a part, each of which needs the one before it.
Chain = Sequence[Operation]


def makespan(chains: Sequence[Chain], beside: float = 1.0) -> float:
    """Seconds until all ``chains`` are done. They begin together; where two want the same resource, the chain that is
    named first has it, and what has begun is not interrupted. Beside others an operation goes at the speed ``beside``.

    For two chains of n equal rounds, an operation of a seconds on one resource and then one of b <= a on another, this
    is 2na + b: the bound max(2na, 2nb), and the ramp in which the second resource ends alone. With a <= b it is
    2nb + a, the ramp being at the start.
    """
    done, clock = [0] * len(chains), 0.0
    running: dict[Resource, tuple[int, float]] = {}
    waiting = list(range(len(chains)))
    while True:
        for chain in list(waiting):
            if done[chain] == len(chains[chain]):
                waiting.remove(chain)
                continue
            resource, seconds = chains[chain][done[chain]]
            if resource not in running:
                running[resource] = chain, seconds
                waiting.remove(chain)
        if not running:
            return clock
        least = min(left for _, left in running.values())
        clock += least if len(running) == 1 else least / beside
        for resource, (chain, left) in list(running.items()):
            if left > least:
                running[resource] = chain, left - least
            else:
                del running[resource]
                done[chain] += 1
                waiting.append(chain)
        waiting.sort()


def bound(chains: Sequence[Chain]) -> float:
    """Seconds that no order of the ``chains`` goes below: the work of the busiest resource, or the longest chain."""
    loads = dict.fromkeys(Resource, 0.0)
    for resource, seconds in (operation for chain in chains for operation in chain):
        loads[resource] += seconds
    return max(*loads.values(), *(sum(seconds for _, seconds in chain) for chain in chains))


class Rates(Config):
    """What a device was measured to do in a second.

    Attributes:
        flops: of bf16 matrix products.
        bandwidth: bytes read from memory.
        beside: speed of an operation while one that is short of something else runs, as a share of its speed alone. At
            0.5, two at once take as long as one after the other.
    """

    flops: PositiveFloat
    bandwidth: PositiveFloat
    beside: float = Field(gt=0, le=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What is computed in a step, or a part of one.

    Attributes:
        tokens: that go through the layers.
        scored: of these, those for which the next token's scores are wanted.
        read: cached tokens that sequences with one new token look at.
        pairs: of a new token of a piece of a prompt, and one that it looks at.
    """

    tokens: float = 0.0
    scored: float = 0.0
    read: float = 0.0
    pairs: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens, self.scored + other.scored, self.read + other.read, self.pairs + other.pairs
        )

    def scaled(self, share: float) -> Work:
        """So much of it."""
        return Work(share * self.tokens, share * self.scored, share * self.read, share * self.pairs)

    def rounded(self) -> Work:
        """With each number at the nearest half power of two."""
        return Work(*(2 ** (round(2 * math.log2(each)) / 2) if each else 0.0 for each in dataclasses.astuple(self)))


class Matrix(NamedTuple):
    """Weights that tokens are multiplied with: ``flops`` for each token, and their ``bytes``."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What the operations of a step cost. A product with weights takes compute, or memory where reading the weights
    takes longer than multiplying; attention takes memory for sequences with one new token and compute for pieces of
    prompts. Norms and the like are left out, and what a kernel costs to launch.

    Attributes:
        layers: how many there are, taken as equal.
        inner: queries, keys and values of a layer.
        outer: the rest of a layer.
        head: what scores take.
        token_bytes: keys and values of a token in a layer.
        pair_flops: of a pair of tokens in a layer.
        rates: of the device.
    """

    layers: int
    inner: Matrix
    outer: Matrix
    head: Matrix
    token_bytes: float
    pair_flops: float
    rates: Rates

    @classmethod
    def of(cls, model: DecoderConfig, rates: Rates, width: int = 2) -> StepCost:
        """For ``model`` with numbers of ``width`` bytes. Of a sparse block all experts are read, as large batches do.
        Windows are not looked at: where a model has them, attention is taken for more than it is."""
        inner = model.hidden * model.head_dim * (model.heads + 2 * model.kv_heads)
        head = model.vocabulary * model.hidden
        multiplied = (model.matmul_parameters() - head) / model.layers
        stored = (model.stored_parameters() - head * (1 if model.tied else 2)) / model.layers
        return cls(
            layers=model.layers,
            inner=Matrix(2 * inner, width * inner),
            outer=Matrix(2 * (multiplied - inner), width * (stored - inner)),
            head=Matrix(2 * head, width * head),
            token_bytes=width * model.kept,
            pair_flops=model.pair_flops,
            rates=rates,
        )

    def chain(self, work: Work) -> list[Operation]:
        """The operations of ``work``."""
        layer = [
            self._product(self.inner, work.tokens),
            Operation(Resource.MEMORY, self.token_bytes * work.read / self.rates.bandwidth),
            Operation(Resource.COMPUTE, self.pair_flops * work.pairs / self.rates.flops),
            self._product(self.outer, work.tokens),
        ]
        head = self._product(self.head, work.scored)
        return self.layers * [each for each in layer if each.seconds] + ([head] if head.seconds else [])

    def seconds(self, parts: Sequence[Work]) -> float:
        """Of a step in these ``parts``, the one that goes first named first."""
        return makespan([self.chain(part) for part in parts], self.rates.beside)

    def _product(self, matrix: Matrix, tokens: float) -> Operation:
        multiplying = matrix.flops * tokens / self.rates.flops
        reading = matrix.bytes / self.rates.bandwidth if tokens else 0.0
        if reading > multiplying:
            return Operation(Resource.MEMORY, reading)
        return Operation(Resource.COMPUTE, multiplying)


#: Places at which a step may be cut, in quarters: of its sequences with one new token up to here, of the pieces of
#: prompts, which come behind them, from here on.
QUARTERS = 4


class Mix(NamedTuple):
    """A step: sequences with one new token, and pieces of prompts."""

    decodes: Work
    prompts: Work

    def cut(self, place: int) -> list[Work]:
        """What is before the ``place``, in quarters, and what is behind it."""
        decoded, prompted = min(place / QUARTERS, 1.0), max(place / QUARTERS - 1.0, 0.0)
        return [
            self.decodes.scaled(decoded) + self.prompts.scaled(prompted),
            self.decodes.scaled(1 - decoded) + self.prompts.scaled(1 - prompted),
        ]


class Split(NamedTuple):
    """Where a step is cut in two, in quarters, and which part goes first."""

    place: int
    lead: int


@dataclasses.dataclass(frozen=True)
class Planner:
    """Finds the best split of a step.

    Attributes:
        cost: of a step.
        gain: the share of the time in one part that a split must save at least.
    """

    cost: StepCost
    gain: float = 0.0

    def best(self, mix: Mix, places: Sequence[int]) -> Split | None:
        """The split of ``mix`` at one of ``places`` that takes the least time; None where one part is better. A mix is
        rounded, so that an engine meets few different ones, and each is searched once."""
        return self._searched(Mix(mix.decodes.rounded(), mix.prompts.rounded()), tuple(places))

    @functools.cached_property
    def _searched(self) -> functools._lru_cache_wrapper[Split | None]:
        return functools.lru_cache(maxsize=1 << 14)(self.search)

    def search(self, mix: Mix, places: Sequence[int]) -> Split | None:
        """:meth:`best` of ``mix`` as it is."""
        best, least = None, (1 - self.gain) * self.cost.seconds([mix.decodes + mix.prompts])
        for place in places:
            parts = [self.cost.chain(part) for part in mix.cut(place)]
            if bound(parts) >= least:
                continue
            for lead in (0, 1):
                seconds = makespan(parts if lead == 0 else parts[::-1], self.cost.rates.beside)
                if seconds < least:
                    best, least = Split(place, lead), seconds
        return best
