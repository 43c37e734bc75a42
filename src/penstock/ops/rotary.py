"""Rotation of queries and keys by their positions, with the norms that some models have before it."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.ops import rowwise


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turns pairs among the first ``turned`` numbers of each head of ``x`` [*T, H, D] by their angles, and leaves the
    others as they are.

    Args:
        cos, sin: of the angles, [*T, 1, turned / 2] or broadcastable to it.
        interleaved: the pairs are neighbours, (x_2i, x_2i+1), and not (x_i, x_{i + turned / 2}).
    """
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat([rotate(x[..., :turned], cos, sin, interleaved), x[..., turned:]], -1)
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of one layer's keys, for those who turn them back, and anew.

    Attributes:
        frequencies: float32 [turned / 2], the angle of each pair for a position.
        magnitude: the factor on cosines and sines.
        interleaved: see :func:`rotate`.
    """

    frequencies: Tensor
    magnitude: float = 1.0
    interleaved: bool = False

    def turn(self, keys: Tensor, positions: Tensor) -> Tensor:
        """``keys`` [*, D] turned by ``positions`` int64 [*] or broadcastable to it."""
        return self._turned(keys, positions, self.magnitude, 1)

    def back(self, keys: Tensor, positions: Tensor) -> Tensor:
        """``keys`` [*, D] as they were before they were turned by ``positions``."""
        return self._turned(keys, positions, 1 / self.magnitude, -1)

    def _turned(self, keys: Tensor, positions: Tensor, magnitude: float, way: int) -> Tensor:
        angles = positions.unsqueeze(-1).float() * self.frequencies.to(positions.device)
        return rotate(keys, magnitude * angles.cos(), way * magnitude * angles.sin(), self.interleaved)


def rotates_natively(query: Tensor, key: Tensor, cos: Tensor, interleaved: bool) -> bool:
    """Whether, on a CPU, :func:`rotate_heads` is one native call for these: then the bits of a token's queries and keys
    do not depend on how many others there are."""
    plain = not interleaved and 2 * cos.shape[-1] == query.shape[-1]
    return plain and query.dim() == 3 and rowwise.serves(query) and key.stride(-1) == 1


def rotate_heads(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``query`` [*T, H, D] and ``key`` [*T, K, D], normed by root-mean-square over each head and multiplied by
    ``scales`` (of queries and keys, [D] each) where there are any, then turned by their positions.

    Where no gradient is wanted and whole heads are turned by halves, it is one kernel on CUDA and one native call on a
    CPU, which read and write all of it once and compute in float32 (float64 is left to PyTorch).

    Args:
        cos, sin, interleaved: see :func:`rotate`.
        eps: added to the mean square.
    """
    plain = not interleaved and 2 * cos.shape[-1] == query.shape[-1]
    if plain and query.is_cuda and query.dtype is not torch.float64 and not torch.is_grad_enabled():
        from penstock.ops.rotary_kernel import rotate_both

        return rotate_both(query, key, cos, sin, scales, eps)
    if rotates_natively(query, key, cos, interleaved):
        typed = None if scales is None else (scales[0].to(query.dtype), scales[1].to(query.dtype))
        return rowwise.rotate_heads(query, key, cos, sin, typed, eps)
    if scales is not None:
        query, key = (
            F.rms_norm(x, scale.shape, scale.to(x.dtype), eps) for x, scale in zip((query, key), scales, strict=True)
        )
    return rotate(query, cos, sin, interleaved), rotate(key, cos, sin, interleaved)
