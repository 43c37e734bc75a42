"""How attention sees a cache that was compressed as a whole.

The first tokens of such a cache do not have a place each: what is left of them lies in fewer places, in a form of its
own, and part of it may lie in the host's memory (:mod:`penstock.ops.paged.aside`). A *view* lays it there, and makes
keys and values of it again, for the queries that are about to see them. Tokens that came since then have places of
their own, behind it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

from torch import Tensor


class Take(Protocol):
    """Gives the vectors [n, K, D] that lie in ``layers`` (one, or int64 [n]) at ``places`` int64 [n], of keys (0) or
    values (1)."""

    def __call__(self, part: int, layers: Tensor | int, places: Tensor, /) -> Tensor: ...


#: Gives the vectors [*, K, D] in the host's memory, of a layer, of tokens int64 [*, K]: each KV head its own.
Fetch = Callable[[int, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Packed:
    """What is left of the first tokens of a sequence.

    Attributes:
        tokens: how many they are.
        take: gives what lies in their places.
        fetch: gives what lies in the host's memory; None where nothing does.
    """

    tokens: int
    take: Take
    fetch: Fetch | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, tokens: int, fetch: Fetch | None = None) -> Packed:
        """That of so many tokens, whose places have ``keys`` and ``values`` [layers, K, m, D]."""

        def take(part: int, layers: Tensor | int, places: Tensor) -> Tensor:
            vectors = (keys, values)[part].transpose(1, 2)
            where = layers.to(vectors.device) if isinstance(layers, Tensor) else layers
            return vectors[where, places.to(vectors.device)]

        return cls(tokens, take, fetch)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Some of the queries of a sequence, and what they see of its first tokens.

    Attributes:
        rows: the queries.
        keys, values: [G, m, K, D]; G is 1 where all of them see the same, else as many as they are.
    """

    rows: slice
    keys: Tensor
    values: Tensor


class View(ABC):
    """Where the first tokens of a compressed cache lie, and what attention sees of them."""

    #: What lies there that is no key and no value, as a clause.
    holds: ClassVar[str]

    #: Whether each KV head is laid by itself.
    head_by_head: ClassVar[bool] = True

    #: Whether nothing lies there but keys and values of tokens, as they would in any place.
    plain: ClassVar[bool] = False

    #: Whether all tokens are there still, in some form.
    whole: ClassVar[bool] = True

    @abstractmethod
    def places(self, tokens: int) -> int:
        """How many places so many tokens take."""

    def aside(self, block_size: int) -> int:
        """Of how many tokens the host's memory keeps a vector for each block of so many places; 0 where it keeps
        none. It suffices for as many tokens as have their places in the blocks."""
        return 0

    @abstractmethod
    def seen(self, layer: int, query: Tensor, packed: Packed, scale: float) -> Iterator[Seen]:
        """What the queries [T, H, D] of tokens behind ``packed`` ones see of these in ``layer``, in pieces that cover
        all T in order. ``scale`` is the factor on scores."""

    @abstractmethod
    def restored(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """The keys and values [layers, K, n, D] of all tokens that are ``packed``, in the order of their places; where
        some are :meth:`missing`, anything in their place."""

    def spans(self, tokens: int) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """Of a :attr:`plain` view, where in the places of so many packed ``tokens`` those of each layer lie, in order:
        the layer whose places they are, the first of these, and the one behind the last."""
        raise NotImplementedError

    def missing(self, tokens: int) -> tuple[int, ...]:
        """Of each layer, how many of the first of so many packed ``tokens``, as :meth:`restored` gives them, are not
        there, since the layer keeps fewer than another; empty where all have as many."""
        return ()
