"""A Decoder over a paged cache: what the cache looks like, and the attention context of a flat batch over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from penstock.models.config import DecoderConfig
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.codecs.contract import Codec
from penstock.ops.paged.codecs.plain import Plain
from penstock.ops.paged.contract import CacheShape, PagedCache

PLAIN_CODEC = Plain()


@dataclasses.dataclass(frozen=True)
class PagedTokens:
    """Tokens [N] of several sequences, whose earlier keys and values are in ``cache``, for which a batch is planned.

    Attributes:
        positions: int64 [N].
    """

    keeps: ClassVar[bool] = True
    positions: Tensor
    cache: PagedCache

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
        return self.cache.attend(layer, query, key, value, scale=scale, window=window, extras=extras)


def cache_shape(
    shape: DecoderConfig,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    codec: Codec = PLAIN_CODEC,
    *,
    blocks: int = 1,
    layers: Sequence[int] | None = None,
) -> CacheShape:
    """What the cache of a model looks like, or of those of its ``layers`` that are given."""
    layers = range(shape.layers) if layers is None else layers
    latent = shape.latent
    needs = {
        "cap": shape.attention_cap is not None,
        "sinks": shape.sinks,
        "chunk": shape.chunked,
        "latent": latent is not None,
    }
    return CacheShape(
        layers=len(layers),
        heads=shape.heads,
        kv_heads=1 if latent else shape.kv_heads,
        head_dim=latent.rank + latent.rotated if latent else shape.head_dim,
        blocks=blocks,
        block_size=block_size,
        dtype=dtype,
        device=device,
        windows=frozenset(None if shape.chunked else shape.window_of(layer) for layer in layers),
        latent=latent.rank if latent else None,
        needs=frozenset(name for name, needed in needs.items() if needed),
        codec=codec,
    )
