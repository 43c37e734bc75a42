"""The contract ``kv.eviction``: in which order idle blocks of the prefix tree are evicted.

A block is *idle* when no sequence holds it, but the tree knows what it holds. Where a sequence wants a block and none
is free, one of the idle ones is evicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from penstock.policy import Policy, contract, unwritten


class Tree(Protocol):
    """What can be known of a block that is in the prefix tree."""

    def parent(self, block: int) -> int | None:
        """The block that leads to it; None of one that a text begins with."""
        ...

    def depth(self, block: int) -> int:
        """How many blocks lead to it."""
        ...

    def uses(self, block: int) -> int:
        """How often a sequence began to hold it, since it is in the tree."""
        ...

    def name(self, block: int) -> bytes:
        """A name for its tokens and all that are before them: equal texts have equal names, also after an eviction."""
        ...


class Order(Protocol):
    """The idle blocks of one pool, and which of them goes next."""

    def add(self, block: int) -> None:
        """Nobody holds ``block`` any more. A sequence lets go of its last block first."""
        ...

    def remove(self, block: int) -> None:
        """An idle block is held again, or no longer in the tree in a moment."""
        ...

    def take(self) -> int:
        """Removes the block that goes next; there is one."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...

    def __contains__(self, block: object) -> bool: ...


class Example(NamedTuple):
    """What a policy keeps of one trace.

    Attributes:
        eviction: the policy.
        blocks: of the pool; each has one token.
        texts: that come one after the other, each of them let go before the next.
        kept: prefixes that are in the cache in the end, whole texts or parts; no others are.
    """

    eviction: Eviction
    blocks: int
    texts: list[tuple[int, ...]]
    kept: set[tuple[int, ...]]


@contract(
    "kv.eviction",
    law="whatever is taken, shared and let go of, the books of the pool add up, and every block that the tree knows "
    "can be reached in it: a leaf goes before what leads to it; on no trace fewer misses than Belady's optimum, which "
    "is that of brute force on small ones; of one trace, what the policy keeps, worked out by hand",
)
class Eviction(Policy):
    """Orders idle blocks.

    A policy gives :meth:`start`, and :meth:`example` for its law.
    """

    def start(self, tree: Tree) -> Order:
        """The order of a pool whose blocks are in ``tree``."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> Example:
        """A trace, and what a policy of this kind keeps of it.

        Work it out by hand, or take it from the paper: the law holds the code against it.
        """
        raise unwritten(cls, "example()", "return Example(eviction, blocks, texts, kept) for one trace")
