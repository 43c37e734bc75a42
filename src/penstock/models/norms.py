"""The norms of a Decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.models.config import DecoderConfig
from penstock.ops import norms


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    @property
    def scale(self) -> Tensor:
        """What the normed numbers are multiplied by, [size]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return norms.rms_norm(x, self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """The same with a scale that is stored less one, which is added, and multiplied by, in float32 (Gemma)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    @property
    def scale(self) -> Tensor:
        return 1.0 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return norms.rms_norm(wide, self.scale, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last dimension, with a learned scale, and a learned shift or none."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


def norm(config: DecoderConfig) -> RMSNorm | LayerNorm:
    """The norm of a token's hidden state, of the model's kind."""
    if config.norm == "layer":
        return LayerNorm(config.hidden, config.norm_eps, config.norm_bias)
    return rms_norm(config, config.hidden)


def rms_norm(config: DecoderConfig, size: int) -> RMSNorm:
    """A root-mean-square norm over ``size`` numbers, of the model's kind."""
    return (OffsetRMSNorm if config.norm == "rms_offset" else RMSNorm)(size, config.norm_eps)
