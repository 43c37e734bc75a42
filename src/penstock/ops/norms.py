"""Norms over the numbers of a row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from penstock.ops import rowwise


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``x`` [*, size] divided by the root of its mean square over the last dimension (``eps`` is added to that), and
    multiplied by ``scale`` [size]. On a CPU, where no gradient is wanted, it is one native call."""
    scale = scale.to(x.dtype)
    return rowwise.rms_norm(x, scale, eps) if rowwise.serves(x) else F.rms_norm(x, scale.shape, scale, eps)
