"""Encoders with a head that makes one number of a text, or of a pair of texts: cross-encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from penstock.core.config import Config
from penstock.models.encoders.encoder import Encoder, Texts
from penstock.models.linear import Linear
from penstock.models.norms import LayerNorm
from penstock.ops.activations import ACTIVATIONS

HEAD_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "tanh": torch.tanh}


class HeadConfig(Config):
    """What the head of a classifier is made of: a matrix, an activation, perhaps a norm, and a matrix of one row.

    Attributes:
        way: it reads the hidden state of the first token (``cls``), or the ``mean`` of all.
        bias: the first matrix has a shift.
        activation: behind it.
        norm: a norm is behind that, and has a shift where ``norm_bias`` is set.
        norm_eps: added to variances.
    """

    way: Literal["cls", "mean"] = "cls"
    bias: bool = True
    activation: Literal["tanh", "gelu", "gelu_tanh", "silu"] = "tanh"
    norm: bool = False
    norm_bias: bool = False
    norm_eps: PositiveFloat = 1e-5


class Classifier(nn.Module):
    """An encoder and a head.

    Attributes:
        encoder: whose hidden states the head reads.
    """

    def __init__(self, encoder: Encoder, head: HeadConfig) -> None:
        super().__init__()
        size = encoder.config.hidden
        self.encoder = encoder
        self.dense = Linear(size, size, bias=head.bias)
        self.norm = LayerNorm(size, head.norm_eps, head.norm_bias) if head.norm else None
        self.out = Linear(size, 1, bias=True)
        self._way, self._activation = head.way, HEAD_ACTIVATIONS[head.activation]

    def forward(self, tokens: Tensor, texts: Texts) -> Tensor:
        """One number [n] for each of n ``texts``, whose flat ``tokens`` are [N]."""
        hidden = torch.split(self.encoder(tokens, texts), texts.lengths)
        read = torch.stack([each[0] if self._way == "cls" else each.mean(0) for each in hidden])
        read = self._activation(self.dense(read))
        found: Tensor = self.out(read if self.norm is None else self.norm(read)).squeeze(-1)
        return found
