"""Attention contexts: the only part of a forward pass that knows how tokens are laid out.

The Decoder treats tokens as flat. A context is made for one forward pass (or, with a cache, for one sequence of them),
tells each token's position, and computes attention from it. Training on packed rows, decoding with a cache, sequence
shards and token trees differ in their context, never in the model.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from penstock.ops.attention import (
    PLAIN,
    Extras,
    attend_packed_rows,
    attend_rows,
    attend_varlen,
    causal_mask,
    varlen_serves,
)


class AttentionContext(Protocol):
    """What the Decoder asks of a context. ``*T`` are the token dimensions that the Decoder was called with."""

    @property
    def positions(self) -> Tensor:
        """int64 [*T] (or broadcastable to it): the position of each token in its sequence."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether keys and values stay in memory for later tokens, so that less of them is better."""
        ...

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        """Attention in ``layer``: query [*T, H, D], key [*T, K, D], value [*T, K, V], result [*T, H, V].

        Where a context :attr:`keeps` them and V is not D, values are the first V numbers of the keys (latent
        attention), and keys alone are kept."""
        ...


@dataclasses.dataclass(frozen=True)
class CausalRows:
    """Tokens [B, T]: every row is one sequence from its start.

    Attributes:
        positions: int64 [1, T].
    """

    keeps: ClassVar[bool] = False
    positions: Tensor

    @classmethod
    def of(cls, length: int, device: torch.device | str = "cpu") -> CausalRows:
        """The context of rows of ``length`` tokens."""
        return cls(torch.arange(length, device=device).unsqueeze(0))

    def to(self, device: torch.device) -> CausalRows:
        """The context on ``device``."""
        return CausalRows(self.positions.to(device, non_blocking=True))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        length = query.shape[1]
        if (window is None or window >= length) and (extras.chunk is None or extras.chunk >= length):
            return attend_rows(query, key, value, scale=scale, causal=True, extras=extras)
        mask = causal_mask(self.positions, self.positions, window, extras.chunk)
        return attend_rows(query, key, value, scale=scale, mask=mask.unsqueeze(1), extras=extras)


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Tokens [B, T]: a row holds one or more documents end to end, and no token sees another document.

    Attributes:
        documents: int64 [B, T], constant within a document and different between neighbours in a row.
        positions: int64 [B, T], counted from each document's start.
        boundaries: int32 [C], where the documents start in the flat order of tokens, padded with B * T. C is the same
            for all batches of a shape, however many documents they hold, unless those are very short: then it doubles.
    """

    keeps: ClassVar[bool] = False
    documents: Tensor
    positions: Tensor
    boundaries: Tensor

    @classmethod
    def of(cls, documents: Tensor) -> PackedRows:
        """The context of the rows ``documents``."""
        rows, length = documents.shape
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        index = torch.arange(length, device=documents.device).expand(rows, length)
        positions = index - torch.where(starts, index, 0).cummax(1).values
        flat = starts.flatten().nonzero().flatten().to(torch.int32)
        capacity = rows + rows * length // 128 + 1
        while capacity <= flat.numel():
            capacity *= 2
        boundaries = torch.full((capacity,), rows * length, dtype=torch.int32, device=documents.device)
        boundaries[: flat.numel()] = flat
        return cls(documents, positions, boundaries)

    def to(self, device: torch.device) -> PackedRows:
        """The context on ``device``. Making it on the CPU first spares a wait for the device."""
        moved = (x.to(device, non_blocking=True) for x in (self.documents, self.positions, self.boundaries))
        return PackedRows(*moved)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        length = query.shape[1]
        head_dim = query.shape[-1]
        fits = value.shape[-1] == head_dim and varlen_serves(query.device, query.dtype, head_dim)
        if fits and extras.none:
            out = attend_varlen(
                query.flatten(0, 1),
                key.flatten(0, 1),
                value.flatten(0, 1),
                self.boundaries,
                length,
                scale=scale,
                window=window,
            )
            return out.view(query.shape)
        same = self.documents.unsqueeze(-1) == self.documents.unsqueeze(-2)
        mask = same & causal_mask(self.positions, self.positions, window, extras.chunk)
        return attend_packed_rows(query, key, value, mask.unsqueeze(1), scale=scale, extras=extras)


def rows_of(documents: Tensor) -> CausalRows | PackedRows:
    """The cheapest context of packed rows: :class:`CausalRows` where each row is one document, as kernels for whole
    rows are faster than those for packed ones."""
    if bool((documents == documents[:, :1]).all()):
        return CausalRows.of(documents.shape[1], documents.device)
    return PackedRows.of(documents)


class CachedRows:
    """Tokens [B, T] that continue B sequences of equal length, whose keys and values are kept: plain decoding.

    Call :meth:`extend` before each forward pass with the number of new tokens.
    """

    keeps: ClassVar[bool] = True

    def __init__(self) -> None:
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen = 0
        self._positions = torch.empty(1, 0, dtype=torch.int64)

    def extend(self, count: int, device: torch.device | str = "cpu") -> CachedRows:
        """Makes room for ``count`` new tokens a row; returns the context itself."""
        self._positions = torch.arange(self._seen, self._seen + count, device=device).unsqueeze(0)
        self._seen += count
        return self

    @property
    def positions(self) -> Tensor:
        return self._positions

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of ``layer`` so far, each [B, T, K, D]."""
        return self._cache[layer]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        if layer in self._cache:
            old_key, old_value = self._cache[layer]
            key, value = torch.cat([old_key, key], 1), torch.cat([old_value, value], 1)
        self._cache[layer] = (key, value)
        if query.shape[1] == key.shape[1] and window is None and extras.chunk is None:
            return attend_rows(query, key, value, scale=scale, causal=True, extras=extras)
        every = torch.arange(key.shape[1], device=key.device).unsqueeze(0)
        mask = causal_mask(self._positions, every, window, extras.chunk)
        return attend_rows(query, key, value, scale=scale, mask=mask.unsqueeze(1), extras=extras)
