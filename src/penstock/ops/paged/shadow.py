"""Keys as low-rank factors, with landmarks of chunks, and values in the host's memory.

Of the first ``n`` tokens of a sequence, the cache of a layer keeps, as numbers laid end to end over the vectors of as
many places as it takes: for each KV head and chunk whether it is kept exactly, the landmarks of the other chunks, the
keys and values of those that are exact, a basis of the keys of all heads before they were turned, and each token's
factors in it. All values lie in the host's memory. What a query sees are the exact chunks, and those whose landmarks it
likes best: their keys are made of the factors, and turned by their positions; only their values are fetched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from penstock.ops.paged.view import Packed, Seen, View
from penstock.ops.rotary import Rotation

#: Numbers of keys, and of their factors, that are in memory at a time where each query sees others.
NUMBERS = 1 << 24


class Shadow(NamedTuple):
    """What the cache keeps of n tokens in a layer: C chunks, of which o are exact in each KV head, and R are not.

    Attributes:
        exact: bool [K, C].
        landmarks: [K, R, D], of the others, in the order of the text.
        keys, values: [K, o * chunk, D], of exact chunks, likewise; keys are turned.
        basis: [rank, K, D], of keys that are not turned.
        factors: [n, rank].
    """

    exact: Tensor
    landmarks: Tensor
    keys: Tensor
    values: Tensor
    basis: Tensor
    factors: Tensor


@dataclasses.dataclass(frozen=True)
class ShadowKeys(View):
    """How attention sees :class:`Shadow`.

    Attributes:
        kv_heads, head_dim: of the cache.
        rank: numbers of a token's factors.
        chunk: tokens that share a landmark. Only whole chunks are packed.
        outliers: most chunks that are exact, in each KV head.
        budget: up to 1 the share of the tokens that a query sees, above it their number, besides those that are exact.
        rotations: what turns the keys of each layer.
    """

    holds: ClassVar[str] = "factors and landmarks beside keys"
    head_by_head: ClassVar[bool] = False

    kv_heads: int
    head_dim: int
    rank: int
    chunk: int
    outliers: int
    budget: float
    rotations: tuple[Rotation | None, ...]

    @property
    def width(self) -> int:
        """Numbers of a token's keys in a layer."""
        return self.kv_heads * self.head_dim

    def sizes(self, tokens: int) -> dict[str, int]:
        """How many numbers each part of a :class:`Shadow` of so many tokens has, in the order in which they lie."""
        chunks = tokens // self.chunk
        exact = min(self.outliers, chunks)
        return {
            "exact": self.kv_heads * chunks,
            "landmarks": (chunks - exact) * self.width,
            "keys": exact * self.chunk * self.width,
            "values": exact * self.chunk * self.width,
            "basis": self.rank * self.width,
            "factors": tokens * self.rank,
        }

    def numbers(self, tokens: int) -> int:
        """How many numbers a layer keeps of so many tokens. With C = n / chunk chunks, of which o are exact, these are
        K C + (C - o + 2 o chunk) K D + rank (K D + n); n whole keys and values would be 2 n K D."""
        return sum(self.sizes(tokens).values()) if tokens else 0

    def places(self, tokens: int) -> int:
        return -(-self.numbers(tokens) // (2 * self.width))

    def aside(self, block_size: int) -> int:
        # A token takes no less than its factors and its part of a landmark.
        return math.ceil(2 * self.width * block_size / (self.rank + self.width / self.chunk))

    def chosen(self, tokens: int) -> int:
        """How many chunks that are not exact a query sees of so many tokens."""
        chunks = tokens // self.chunk
        wanted = self.budget * tokens if self.budget <= 1 else self.budget
        return min(math.ceil(wanted / self.chunk), chunks - min(self.outliers, chunks))

    def lay(self, shadow: Shadow) -> tuple[Tensor, Tensor]:
        """What lies in the places of a layer's keys and values, [K, m, D] each."""
        flat = torch.cat([each.flatten().to(shadow.factors.dtype) for each in shadow])
        places = self.places(len(shadow.factors))
        flat = torch.nn.functional.pad(flat, (0, 2 * places * self.width - len(flat)))
        keys, values = flat.view(2, self.kv_heads, places, self.head_dim)
        return keys, values

    def read(self, layer: int, packed: Packed) -> Shadow:
        """What :meth:`lay` laid."""
        places = torch.arange(self.places(packed.tokens))
        flat = torch.stack([packed.take(part, layer, places).transpose(0, 1) for part in (0, 1)]).flatten()
        sizes = self.sizes(packed.tokens)
        parts = torch.split(flat[: sum(sizes.values())], list(sizes.values()))
        found = dict(zip(sizes, parts, strict=True))
        heads, dim = self.kv_heads, self.head_dim
        return Shadow(
            exact=found["exact"].view(heads, -1) != 0,
            **{name: found[name].view(heads, -1, dim) for name in ("landmarks", "keys", "values")},
            basis=found["basis"].view(self.rank, heads, dim),
            factors=found["factors"].view(-1, self.rank),
        )

    def seen(self, layer: int, query: Tensor, packed: Packed, scale: float) -> Iterator[Seen]:
        assert packed.fetch is not None
        shadow, count = self.read(layer, packed), self.chosen(packed.tokens)
        others = _numbers_of(~shadow.exact)
        each = max(1, count * self.chunk * self.kv_heads * max(self.rank, self.head_dim))
        # Where all chunks are chosen, all queries see the same.
        apart = count < others.shape[1]
        size = max(1, NUMBERS // each) if apart else len(query)
        for first in range(0, len(query), size):
            rows = slice(first, min(first + size, len(query)))
            best = best_chunks(query[rows] if apart else query[:1], shadow.landmarks, count, scale)
            tokens = self._tokens(others.expand(len(best), -1, -1).take_along_dim(best, -1))
            keys = self.rebuilt(layer, shadow, tokens).to(query.dtype).transpose(1, 2)
            values = packed.fetch(layer, tokens.transpose(1, 2))
            exact = (part.transpose(0, 1).expand(len(keys), -1, -1, -1) for part in (shadow.keys, shadow.values))
            yield Seen(rows, *(torch.cat(pair, 1) for pair in zip((keys, values), exact, strict=True)))

    def restored(self, packed: Packed) -> tuple[Tensor, Tensor]:
        assert packed.fetch is not None
        found = []
        tokens = torch.arange(packed.tokens)
        for layer in range(len(self.rotations)):
            shadow = self.read(layer, packed)
            own = tokens.to(shadow.factors.device).expand(self.kv_heads, -1)
            keys = self.rebuilt(layer, shadow, own.unsqueeze(0))[0].to(shadow.factors.dtype)
            exact = self._tokens(_numbers_of(shadow.exact)).unsqueeze(-1)
            keys = keys.scatter(1, exact.expand(-1, -1, self.head_dim), shadow.keys)
            found.append((keys, packed.fetch(layer, own.T).transpose(0, 1)))
        keys, values = (torch.stack(part) for part in zip(*found, strict=True))
        return keys, values

    def rebuilt(self, layer: int, shadow: Shadow, tokens: Tensor) -> Tensor:
        """The keys float32 [*, K, m, D] of ``tokens`` int64 [*, K, m], made of their factors and turned."""
        keys = torch.einsum("tkmr,rkd->tkmd", shadow.factors[tokens].float(), shadow.basis.float())
        rotation = self.rotations[layer]
        return keys if rotation is None else rotation.turn(keys, tokens)

    def _tokens(self, chunks: Tensor) -> Tensor:
        """Those of ``chunks`` int64 [*, m]: [*, m * chunk]."""
        return (chunks.unsqueeze(-1) * self.chunk + torch.arange(self.chunk, device=chunks.device)).flatten(-2)


def best_chunks(query: Tensor, landmarks: Tensor, count: int, scale: float) -> Tensor:
    """Which ``count`` of the chunks with ``landmarks`` [K, R, D] each query [T, H, D] sees: int64 [T, K, count],
    ascending. Each query head of a KV head has a distribution over the landmarks, the softmax of its scores; a chunk is
    worth what the head gives it that gives it the most. Of equal ones, the earlier is seen."""
    heads, dim = landmarks.shape[0], landmarks.shape[-1]
    grouped = query.float().view(len(query), heads, -1, dim)
    shares = (torch.einsum("tkgd,krd->tkgr", grouped, landmarks.float()) * scale).softmax(-1)
    worth = shares.amax(2)
    return worth.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values


def _numbers_of(marked: Tensor) -> Tensor:
    """The places that are ``marked`` in each row, bool [K, C], as many in all: int64 [K, m], ascending."""
    return marked.nonzero()[:, 1].view(len(marked), -1)
