"""Accepting or rejecting a draft, and what is left of the target after a rejection: what most verifiers share."""

from __future__ import annotations

import torch
from torch import Tensor


def at(values: Tensor, tokens: Tensor) -> Tensor:
    """``values`` [R, V] of ``tokens`` int64 [R, k]; 0 where there is none (-1)."""
    return values.gather(-1, tokens.clamp(min=0)) * (tokens >= 0)


def accepted(target: Tensor, proposal: Tensor) -> Tensor:
    """The probability min(1, target / proposal) to accept a draft of these probabilities (alike in shape); 0 for what
    the proposal cannot have drafted."""
    return torch.where(proposal > 0, target / proposal, 0).clamp(max=1)


def leftover(target: Tensor, proposal: Tensor) -> Tensor:
    """What the target [R, V] has beyond the ``proposal``, as a distribution; the target where it has nothing beyond."""
    rest = (target - proposal).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, target)


def mixed(chosen: Tensor, drafted: Tensor, otherwise: Tensor) -> Tensor:
    """The distribution [R, V] that gives the ``drafted`` tokens [R, k] the probabilities ``chosen``, of the same shape,
    and shares what is left of 1 as ``otherwise`` [R, V] does. No token (-1) must be chosen with probability 0."""
    left = (1 - chosen.sum(-1, keepdim=True)).clamp(min=0)
    return (left * otherwise).scatter_add(-1, drafted.clamp(min=0), chosen)


def without(proposal: Tensor, tokens: Tensor) -> Tensor:
    """The distribution [R, V] that is left of ``proposal`` without ``tokens`` int64 [R, k], which are distinct (-1 is
    none); zeros where nothing is left."""
    left = proposal.scatter_add(-1, tokens.clamp(min=0), -at(proposal, tokens))
    return left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
