"""Coupled quantization: neighbouring channels share one code."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from penstock.ops.paged.codecs.contract import LearnedCodec, Stored
from penstock.policy import policy

#: Distances that are in memory at a time.
PIECE = 1 << 24


@policy("kv.codec", "coupled", papers=[270])
class Coupled(LearnedCodec):
    """Groups of ``channels`` neighbouring channels of a key or a value, each replaced by the nearest of 2^``bits``
    centroids: ``bits / channels`` bits a channel. Every group of every head of every layer has a codebook of its own,
    learned together for all its channels, which are far from independent (CQ). A vector takes
    ceil(head_dim / channels * bits / 8) bytes.

    A codebook begins as the product of one codebook a channel, with the bits dealt out as evenly as can be, and then
    takes at most ``steps`` of Lloyd's algorithm, none of which makes it worse: so it is never worse on its text than
    channels coded one by one. Ours: that beginning, and that keys are coded as they lie in the cache, rotated. Not
    built: errors weighted by Fisher information.
    """

    holds_nan: ClassVar[bool] = False

    channels: PositiveInt = 4
    bits: int = Field(8, ge=1, le=12)
    steps: NonNegativeInt = 8

    def lacks(self, head_dim: int) -> str | None:
        if head_dim % self.channels:
            return f"heads of {head_dim} numbers cannot be cut into groups of {self.channels} channels"
        return None

    def stored(self, head_dim: int, dtype: torch.dtype) -> Stored:
        return Stored(-(-head_dim // self.channels * self.bits // 8), torch.uint8)

    def learn(self, vectors: Tensor) -> Tensor:
        """Codebooks, float32 [K, groups, 2^bits, channels]."""
        groups = self._grouped(vectors.float()).permute(1, 2, 0, 3)
        books = lloyd(groups.flatten(0, 1), product_books(groups.flatten(0, 1), self.bits), self.steps)
        return books.view(*groups.shape[:2], *books.shape[1:])

    def encode(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        assert table is not None
        groups = self._grouped(vectors.float()).flatten(0, -4)
        step = max(1, PIECE // (table.numel() // self.channels))
        codes = [nearest(part, table) for part in torch.split(groups, step)]
        return packed(torch.cat(codes), self.bits).view(*vectors.shape[:-1], -1)

    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
        assert table is not None
        heads, groups = table.shape[:2]
        codes = unpacked(stored, groups, self.bits)
        head = torch.arange(heads, device=stored.device)[:, None]
        return table[head, torch.arange(groups, device=stored.device), codes].flatten(-2).to(dtype)

    def bound(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        assert table is not None
        # The distance of a group to its nearest centroid.
        groups = self._grouped(vectors.double()).permute(1, 2, 0, 3)
        least = torch.cdist(groups, table.double()).amin(-1, keepdim=True).permute(2, 0, 1, 3)
        return (least * (1 + 2.0**-20) + 2.0**-60).expand(*least.shape[:-1], self.channels).flatten(-2)

    def _grouped(self, vectors: Tensor) -> Tensor:
        """Vectors [..., D] as [..., groups, channels]."""
        return vectors.reshape(*vectors.shape[:-1], -1, self.channels)


def nearest(groups: Tensor, books: Tensor) -> Tensor:
    """For each of ``groups`` [N, K, G, c] the nearest centroid of its book in ``books`` [K, G, M, c]: int64 [N, K, G].

    The sums are taken number by number: a product of matrices may round otherwise for another N."""
    distance = torch.zeros((), device=groups.device)
    for channel in range(groups.shape[-1]):
        distance = distance + (groups[..., channel, None] - books[..., channel]).square()
    return distance.argmin(-1)


def lloyd(points: Tensor, books: Tensor, steps: int) -> Tensor:
    """``books`` [S, M, c] after so many steps of Lloyd's algorithm on ``points`` [S, N, c]: each centroid goes to the
    mean of the points that it is nearest to, and one without any stays. Ends early where nothing moves."""
    for _ in range(steps):
        sums, counts = torch.zeros_like(books), torch.zeros_like(books[..., :1])
        for part in torch.split(points, max(1, PIECE // (books.shape[0] * books.shape[1])), 1):
            distance = torch.baddbmm(books.square().sum(-1)[:, None], part, books.mT, alpha=-2)
            code = distance.argmin(-1, keepdim=True)
            sums.scatter_add_(1, code.expand_as(part), part)
            counts.scatter_add_(1, code, torch.ones_like(part[..., :1]))
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), books)
        if torch.equal(moved, books):
            break
        books = moved
    return books


def product_books(points: Tensor, bits: int, steps: int = 20) -> Tensor:
    """Codebooks [S, 2^bits, c] for ``points`` [S, N, c] whose channels are coded one by one, each with its own 2^k
    values by Lloyd's algorithm; the first channels have a bit more where ``bits`` cannot be shared evenly."""
    channels = points.shape[-1]
    books = points.new_zeros(len(points), 1, 0)
    for channel in range(channels):
        count = 2 ** (bits // channels + (channel < bits % channels))
        own = points[..., channel : channel + 1]
        shares = (torch.arange(count, device=points.device, dtype=points.dtype) + 0.5) / count
        values = lloyd(own, own[..., 0].quantile(shares, 1).T[..., None].contiguous(), steps)
        books = torch.cat([books.repeat_interleave(count, 1), values.repeat(1, books.shape[1], 1)], -1)
    return books


def packed(codes: Tensor, bits: int) -> Tensor:
    """``codes`` [..., n] of so many bits one behind the other, the low bits first: uint8 [..., ceil(n bits / 8)]."""
    if bits == 8:
        return codes.to(torch.uint8)
    ones = codes[..., None] >> torch.arange(bits, device=codes.device) & 1
    whole = F.pad(ones.flatten(-2), (0, -codes.shape[-1] * bits % 8))
    whole = whole.view(*codes.shape[:-1], -1, 8)
    return (whole << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpacked(stored: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` codes in ``stored``: int64 [..., count]."""
    if bits == 8:
        return stored.long()
    ones = (stored[..., None] >> torch.arange(8, device=stored.device, dtype=torch.uint8) & 1).flatten(-2)
    codes = ones[..., : count * bits].reshape(*stored.shape[:-1], count, bits).long()
    return (codes << torch.arange(bits, device=stored.device)).sum(-1)
