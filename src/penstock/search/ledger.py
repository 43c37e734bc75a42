"""What a search has cost, in every unit in which it can be limited."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from penstock.core.config import Config
from penstock.search.prices import Prices, Unit


class Budget(Config):
    """What a program may spend on a problem: ``amount`` of ``unit``. Without an amount there is no end."""

    amount: Annotated[float, Field(ge=0)] | None = None
    unit: Unit = "generated"


@dataclasses.dataclass(frozen=True)
class Wish:
    """An extension that is asked for: of a text with ``length`` tokens, the first ``computed`` of which have been
    computed, by up to ``most``, at the ``prices`` of the model that computes it. ``given`` tokens were the prompt."""

    length: int
    computed: int
    most: int
    prices: Prices
    given: int

    def price(self, unit: Unit, count: int) -> float:
        """Of ``count`` tokens: all positions before the last of them are computed."""
        if unit == "generated":
            return float(count)
        return self.prices.cost(unit, self.computed, self.length - 1 + count, self.given) if count else 0.0


@dataclasses.dataclass
class Ledger:
    """What a program spent on a problem.

    The first fields count what the program asked for, whatever the engine did beside; budgets are kept by them, so that
    the same seed gives the same tree. The others, from ``discarded`` on, say what the engine made of it.

    Attributes:
        prompt: tokens that were given: the prompt, once, and what was appended to branches.
        generated: tokens that came out.
        tokens: positions that had to be computed: given and generated ones, but for the newest of each branch; and all
            of a text again whose hidden states were asked for.
        scored: generated tokens that scorers read.
        forks: branches that were made of others.
        flops: arithmetic operations of ``tokens``.
        eflops: the same, with the reading of keys and values.
        scorings: texts that were scored; ``failures`` of them could not be.
        discarded: tokens that the engine generated beside those that count, within what the budget had granted: behind
            the end of an extension, or of a race.
        cached: given and generated tokens that an extension found in the cache.
        computed: positions that the engine computed; more than ``tokens`` where memory was short, and fewer where texts
            that were given to several branches happen to begin alike.
        blocks: most blocks of the cache that the branches held, each counted once, at the end of a round.
    """

    prompt: int = 0
    generated: int = 0
    tokens: float = 0
    scored: int = 0
    forks: int = 0
    flops: float = 0.0
    eflops: float = 0.0
    scorings: int = 0
    failures: int = 0
    discarded: int = 0
    cached: int = 0
    computed: int = 0
    blocks: int = 0

    def extend(self, wish: Wish, count: int) -> None:
        """An extension came to ``count`` tokens."""
        self.generated += count
        if count:
            self.tokens += wish.price("tokens", count)
            self.flops += wish.price("flops", count)
            self.eflops += wish.price("eflops", count)

    def read(self, prices: Prices, count: int) -> None:
        """A text of ``count`` tokens was computed from its beginning, beside the cache, at these ``prices``."""
        self.tokens += prices.cost("tokens", 0, count)
        self.flops += prices.cost("flops", 0, count)
        self.eflops += prices.cost("eflops", 0, count)

    def left(self, budget: Budget) -> float:
        """What may still be spent; infinity without an amount."""
        return float("inf") if budget.amount is None else budget.amount - float(getattr(self, budget.unit))

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    def __add__(self, other: Ledger) -> Ledger:
        """Both together; of blocks, the larger figure."""
        sums = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in dataclasses.fields(self)}
        return Ledger(**sums | {"blocks": max(self.blocks, other.blocks)})


def total(ledgers: Sequence[Ledger]) -> Ledger:
    """All ``ledgers`` together."""
    return functools.reduce(Ledger.__add__, ledgers, Ledger())


def shares(wishes: Sequence[Wish], unit: Unit, left: float) -> list[int]:
    """How many tokens each of ``wishes`` may have: as if all went on together, a token each in turn, until what is
    ``left`` of the budget does not pay for the next one."""

    def counts(level: int) -> list[int]:
        return [min(level, wish.most) for wish in wishes]

    def price(counted: Sequence[int]) -> float:
        return sum(wish.price(unit, count) for wish, count in zip(wishes, counted, strict=True))

    low, high = 0, max((wish.most for wish in wishes), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if price(counts(middle)) <= left else (low, middle - 1)
    granted = counts(low)
    for place, wish in enumerate(wishes):
        if granted[place] < wish.most:
            more = [*granted[:place], granted[place] + 1, *granted[place + 1 :]]
            if price(more) > left:
                break
            granted = more
    return granted
