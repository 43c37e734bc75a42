"""Dense attention over rows of equal length, through PyTorch's fused kernels."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class Extras(NamedTuple):
    """What the attention of some families does besides scaling scores and sliding a window.

    Attributes:
        cap: scores s become cap tanh(s / cap) (soft-capping).
        sinks: [H], a score for each query head that takes part in its softmax, and has no value.
        chunk: a token sees none before the last multiple of this many positions, its own included.
    """

    cap: float | None = None
    sinks: Tensor | None = None
    chunk: int | None = None

    @property
    def none(self) -> bool:
        """Whether there is nothing of this."""
        return self.cap is None and self.sinks is None and self.chunk is None


PLAIN = Extras()


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    extras: Extras = PLAIN,
) -> Tensor:
    """Attention within each row of a batch.

    Args:
        query: [B, T, H, D].
        key, value: [B, S, K, D] and [B, S, K, V] with H a multiple of K (grouped queries share a key head).
        scale: factor on the scores.
        mask: bool, broadcastable to [B, 1, T, S]; True lets a query see a key.
        causal: query t sees keys 0..t (needs T = S and no mask).
        extras: of which the chunk is the mask's business.

    Returns:
        [B, T, H, V] in the dtype of ``query``.
    """
    if extras.cap is not None or extras.sinks is not None:
        return _attend_plainly(query, key, value, scale, mask, causal, extras)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type == "cpu":
        # The CPU's fused kernel takes equal head counts only.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )
    return out.transpose(1, 2)


def _attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, causal: bool, extras: Extras
) -> Tensor:
    """:func:`attend_rows` with all scores in memory, for what no fused kernel of PyTorch's does."""
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    scores = torch.einsum("bthd,bshd->bhts", query * scale, key)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if extras.cap is not None:
        scores = extras.cap * torch.tanh(scores / extras.cap)
    if causal:
        place = torch.arange(query.shape[1], device=query.device)
        mask = causal_mask(place, place)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if extras.sinks is not None:
        sinks = extras.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[1]]
    return torch.einsum("bhts,bshd->bthd", weights.to(value.dtype), value)


#: The size of the largest heads that PyTorch's kernel for sequences that lie end to end is built for.
VARLEN_LARGEST = 256

#: Queries at a time where keys after them are skipped. Smaller pieces skip more and cost more calls; measured on CPUs.
QUERY_BLOCK = 256


def attend_packed_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float, extras: Extras = PLAIN
) -> Tensor:
    """:func:`attend_rows` for a ``mask`` under which no query sees a later key: each block of queries is computed
    against the keys up to its end, not against all of them.

    Args:
        query: [B, T, H, D]; key, value: [B, T, K, D].
        mask: bool [B, 1, T, T].
        scale, extras: as there.
    """
    blocks = [(start, min(start + QUERY_BLOCK, query.shape[1])) for start in range(0, query.shape[1], QUERY_BLOCK)]
    parts = [
        attend_rows(query[:, a:b], key[:, :b], value[:, :b], scale=scale, mask=mask[:, :, a:b, :b], extras=extras)
        for a, b in blocks
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def causal_mask(queries: Tensor, keys: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Which keys a query sees by position alone: bool [..., T, S] from positions [..., T] and [..., S]."""
    queries, keys = queries.unsqueeze(-1), keys.unsqueeze(-2)
    seen = queries >= keys
    if chunk is not None:
        seen = seen & (queries // chunk == keys // chunk)
    return seen if window is None else seen & (queries - keys < window)


def varlen_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel of :func:`attend_varlen` takes queries, keys and values of ``head_dim`` numbers."""
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= VARLEN_LARGEST


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention within each of several sequences that lie end to end, where :func:`varlen_serves`.

    Args:
        query: [N, H, D]; key, value: [N, K, D].
        boundaries: int32 [sequences + 1], from 0 to N; empty sequences are allowed.
        longest: an upper bound of the sequence lengths.
        scale: factor on the scores.
        window: sliding window in tokens, or None.
    """
    from torch.nn.attention.varlen import varlen_attn

    # Later releases want grouped queries announced; in 2.11 the kernel just takes them.
    announced = "enable_gqa" in inspect.signature(varlen_attn).parameters and query.shape[1] != key.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": True} if announced else {}
    left = -1 if window is None else window - 1
    out = varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scale, window_size=(left, 0), **grouped
    )
    return cast(Tensor, out)
