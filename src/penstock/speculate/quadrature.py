"""Integrals over the half-line, by which probabilities of "who rings first" among exponential clocks are computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The step of the trapezoidal rule; halving it doubles the digits.
STEP = 0.25


def half_line(slowest: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights, float64 [N] each, such that sum(weights * f(nodes)) is the integral of f over (0, inf) to
    about 14 digits, for f made of decaying exponentials with rates between ``slowest`` and 1.

    The trapezoidal rule after the substitution s = exp(t - exp(-t)), of the double exponential rules of Takahasi and
    Mori (1974): it is spread over all orders of magnitude alike.
    """
    # From where s is too small to matter, exp(-40), to where exp(-slowest s) is.
    t = torch.arange(-math.log(40), math.log(40 / slowest), STEP, dtype=torch.float64, device=device)
    nodes = (t - (-t).exp()).exp()
    return nodes, STEP * nodes * (1 + (-t).exp())
