"""The activations of feed-forward blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.ops import invariant, native, rowwise

#: Numbers to as many numbers, or pairs of a gate and what it multiplies to half as many.
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}

#: Of gpt-oss's gate: x sigmoid(1.702 x) is close to gelu.
STEEPNESS = 1.702


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, of ``x`` [*N, 2 * F], whose first half is the gate: [*N, F]. On a CPU, where no gradient is
    wanted, it is one native call."""
    if rowwise.serves(x) and native.serves(invariant.SOURCE):
        return invariant.invariant_swiglu(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def gated(name: str) -> Activation:
    """The same with another activation of the gate."""
    if name == "silu":
        return swiglu
    return functools.partial(_gated, ACTIVATIONS[name])


def _gated(activation: Activation, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return activation(gate) * up


def clamped_swiglu(x: Tensor, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(1.702 gate), of ``x`` [*N, 2 * F], in which gate and up are neighbours: [*N, F]. Both
    are cut off at ``limit``, up at its negative too."""
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(STEEPNESS * gate)
