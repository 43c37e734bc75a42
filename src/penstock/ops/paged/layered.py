"""Where the keys and values lie of caches that keep fewer tokens in some layers than in others.

A place of the cache has a vector in each layer, for each KV head, of keys and of values. What the layers keep is laid
end to end, layer by layer, over the vectors of all layers of as many places as it takes. Heads, keys and values lie
alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from penstock.ops.paged.view import Packed, Seen, View


@dataclasses.dataclass(frozen=True)
class LayeredTokens(View):
    """Budgets that fall in equal steps from the first layer to the last.

    Attributes:
        layers: of the cache.
        budget: of a layer in the mean: up to 1 a share of the tokens, above it their number.
        least: the fewest tokens of a layer.
        steep: how many times as many tokens beyond the ``least`` the first layer keeps as are kept in the mean, from 1
            to 2; fewer where it would not have so many.
    """

    holds: ClassVar[str] = "tokens of some layers in the places of others"
    plain: ClassVar[bool] = True
    whole: ClassVar[bool] = False

    layers: int
    budget: float
    least: int
    steep: float

    def counts(self, tokens: int) -> tuple[int, ...]:
        """How many of so many tokens each layer keeps. One token more is one more in each layer at most, so that what
        they are to keep later on is there."""
        wanted = self.budget * tokens if self.budget <= 1 else self.budget
        more = min(wanted, tokens) - self.least
        if more <= 0:
            return (min(self.least, tokens),) * self.layers
        # Of a share, no layer's may be above 1; of a number, none above what there is.
        first = min(self.steep, 1 / self.budget if self.budget <= 1 else (tokens - self.least) / more)
        steps = [2 * layer / max(1, self.layers - 1) for layer in range(self.layers)]
        shares = [1.0] if self.layers == 1 else [first + (1 - first) * step for step in steps]
        # Rounded first: what comes to a whole number is not a little less.
        return tuple(self.least + math.floor(round(more * share, 6)) for share in shares)

    def places(self, tokens: int) -> int:
        return -(-sum(self.counts(tokens)) // self.layers)

    def lay(self, vectors: Sequence[Tensor]) -> Tensor:
        """The vectors [layers, K, m, D] of the places: of those [K, n, D] that each layer keeps."""
        laid = torch.cat(list(vectors), 1)
        places = -(-laid.shape[1] // self.layers)
        laid = torch.nn.functional.pad(laid, (0, 0, 0, self.layers * places - laid.shape[1]))
        return laid.view(len(laid), self.layers, places, -1).transpose(0, 1)

    def seen(self, layer: int, query: Tensor, packed: Packed, scale: float) -> Iterator[Seen]:
        keys, values = (self._restore(layer, part, packed).unsqueeze(0) for part in (0, 1))
        yield Seen(slice(0, len(query)), keys, values)

    @functools.lru_cache(1024)  # noqa: B019, a view is a value
    def spans(self, tokens: int) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        places, first, found = self.places(tokens), 0, []
        for count in self.counts(tokens):
            numbers = range(first, first + count)
            layers = range(first // places, -(-numbers.stop // places))
            found.append(
                tuple(
                    (layer, max(first - layer * places, 0), min(numbers.stop - layer * places, places))
                    for layer in layers
                )
            )
            first += count
        return tuple(found)

    def missing(self, tokens: int) -> tuple[int, ...]:
        counts = self.counts(tokens)
        return tuple(max(counts) - count for count in counts)

    def restored(self, packed: Packed) -> tuple[Tensor, Tensor]:
        found = []
        for part in (0, 1):
            rows = [
                torch.nn.functional.pad(self._restore(layer, part, packed), (0, 0, 0, 0, missing, 0))
                for layer, missing in enumerate(self.missing(packed.tokens))
            ]
            found.append(torch.stack(rows).transpose(1, 2))
        return found[0], found[1]

    def _restore(self, layer: int, part: int, packed: Packed) -> Tensor:
        """The keys (0) or values (1) [n, K, D] that ``layer`` has."""
        counts, places = self.counts(packed.tokens), self.places(packed.tokens)
        numbers = sum(counts[:layer]) + torch.arange(counts[layer])
        take = functools.partial(packed.take, part)
        return take(numbers // places, numbers % places)
