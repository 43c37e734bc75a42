"""Where the keys and values of tokens lie that neighbouring layers share.

A place of the cache has a vector in each layer, for each KV head, of keys and of values. Where pairs of layers share
the directions of their vectors, ``n`` tokens take fewer vectors than ``n`` in each layer, and those are laid end to end
over the vectors of all layers of as many places as it takes. Heads, keys and values lie alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from penstock.ops.paged.view import Packed, Seen, View


class Shared(NamedTuple):
    """What pairs of layers share, ``*`` being pairs and KV heads: ``directions`` [*, n, D], of which the first r are
    the vectors themselves, of the first layer; ``others`` [*, r, D], those of the second layer; and ``norms``
    [*, 2, n], what the directions are multiplied by in either layer, 1 for the first r."""

    directions: Tensor
    others: Tensor
    norms: Tensor


@dataclasses.dataclass(frozen=True)
class PairedLayers(View):
    """The last ``2 * pairs`` of so many ``layers`` share directions, two by two.

    Attributes:
        layers: of the cache.
        pairs: of layers that share.
        head_dim: numbers of a vector.
        retained: which share of the tokens is kept in both layers of a pair.
    """

    holds: ClassVar[str] = "norms beside directions"

    layers: int
    pairs: int
    head_dim: int
    retained: float

    @property
    def single(self) -> int:
        """How many layers come before the pairs."""
        return self.layers - 2 * self.pairs

    def apart(self, tokens: int) -> int:
        """How many of so many tokens are kept in both layers of a pair."""
        # Rounded first: a share such as 0.07 of 100 tokens is 7, and not a little more.
        return math.ceil(round(self.retained * tokens, 6))

    def norms(self, tokens: int) -> int:
        """Vectors that hold the norms of both layers of a pair."""
        return -(-2 * tokens // self.head_dim)

    def vectors(self, tokens: int) -> int:
        """How many vectors so many tokens take, in all layers."""
        return self.single * tokens + self.pairs * (tokens + self.apart(tokens) + self.norms(tokens))

    def places(self, tokens: int) -> int:
        """How many places that is."""
        return -(-self.vectors(tokens) // self.layers)

    def lay(self, single: Tensor, shared: Shared) -> Tensor:
        """The vectors [layers, K, m, D] of the m places: of the ``single`` layers [S, K, n, D], and of what the pairs
        share."""
        tokens = shared.directions.shape[-2]
        norms = shared.norms.flatten(-2)
        norms = torch.nn.functional.pad(norms, (0, self.norms(tokens) * self.head_dim - norms.shape[-1]))
        norms = norms.view(*norms.shape[:-1], -1, self.head_dim)
        pairs = torch.cat([shared.directions, shared.others, norms], -2)
        laid = torch.cat([each.transpose(0, 1).flatten(1, 2) for each in (single, pairs)], 1)
        places = self.places(tokens)
        laid = torch.nn.functional.pad(laid, (0, 0, 0, self.layers * places - laid.shape[1]))
        return laid.view(-1, self.layers, places, self.head_dim).transpose(0, 1)

    def seen(self, layer: int, query: Tensor, packed: Packed, scale: float) -> Iterator[Seen]:
        keys, values = (self._restore(layer, packed.tokens, take).unsqueeze(0) for take in _parts(packed))
        yield Seen(slice(0, len(query)), keys, values)

    def restored(self, packed: Packed) -> tuple[Tensor, Tensor]:
        found = [
            torch.stack([self._restore(layer, packed.tokens, take) for layer in range(self.layers)])
            for take in _parts(packed)
        ]
        return found[0].transpose(1, 2), found[1].transpose(1, 2)

    def _restore(self, layer: int, tokens: int, take: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The vectors [n, K, D] of so many tokens in ``layer``, of those that ``take`` gives of layers at places."""
        places, number = self.places(tokens), torch.arange(tokens)

        def at(numbers: Tensor) -> Tensor:
            return take(numbers // places, numbers % places)

        if layer < self.single:
            return at(layer * tokens + number)
        apart, count = self.apart(tokens), self.norms(tokens)
        pair, second = divmod(layer - self.single, 2)
        first = self.single * tokens + pair * (tokens + apart + count)
        norms = at(first + tokens + apart + torch.arange(count)).transpose(0, 1).flatten(1)
        own = norms[:, second * tokens : (second + 1) * tokens].T.unsqueeze(-1)
        if second:
            number = torch.where(number < apart, tokens + number, number)
        directions = at(first + number)
        return (directions.float() * own.float()).to(directions.dtype)


def _parts(packed: Packed) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """What gives the keys and the values of layers at places."""
    return [functools.partial(packed.take, part) for part in (0, 1)]
