"""The feed-forward of a mixture of experts, and the choice of the experts: what inference on CUDA computes in kernels
of its own, and everything else by operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from penstock.ops.activations import Activation, swiglu
from penstock.ops.grouped import grouped_linear
from penstock.ops.quantized.contract import PackedStack


def top_few(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row of ``scores`` [N, E], from the largest down, and their places, int64:
    [N, count] each. Of equals the first on CUDA, where a kernel finds them; there are no more than a few hundred."""
    if scores.is_cuda and not _wants_grad(scores):
        values, places = _top_few(scores, count)
        return values, places
    found = scores.topk(count, -1)
    return found.values, found.indices


class ByExpert(NamedTuple):
    """Assignments of N tokens to k experts each, in the order of the experts, those of an expert as they come.

    Attributes:
        order: integers [N * k], the assignments.
        back: the same, where each of them is in that order.
        ends: int32 [E], where those of each expert end.
    """

    order: Tensor
    back: Tensor
    ends: Tensor


def by_expert(experts: Tensor, count: int) -> ByExpert:
    """The assignments of N tokens to ``experts`` int64 [N, k], of which there are ``count``."""
    chosen = experts.flatten()
    if chosen.is_cuda:
        return ByExpert(*_by_expert(chosen, count))
    order = chosen.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return ByExpert(order, back, F.one_hot(chosen, count).sum(0).cumsum(0).to(torch.int32))


def mixed_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor | PackedStack,
    down: Tensor | PackedStack,
    *,
    activation: Activation = swiglu,
    biases: tuple[Tensor, Tensor] | None = None,
    weigh_inputs: bool = False,
) -> Tensor:
    """What the experts of each token make of it, added up with their weights, in the router's order: the same sum every
    time, which adding from the experts' side is not on CUDA.

    Args:
        x: [N, hidden].
        experts: int64 [N, k], of each token.
        weights: [N, k], of each of these.
        gate_up: [E, 2 * ffn, hidden]; plain or as it is stored.
        down: [E, hidden, ffn]; the same.
        activation: [*, 2 * ffn] to [*, ffn].
        biases: of the two products, [E, 2 * ffn] and [E, hidden].
        weigh_inputs: multiplies what goes into an expert by its weight, instead of what comes out.

    Returns:
        [N, hidden].
    """
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
        usual = activation is swiglu and biases is None and not weigh_inputs
        if usual and x.is_cuda and x.dtype == torch.bfloat16 and not _wants_grad(x, weights, gate_up, down):
            mixed: Tensor = _mixed(x, experts, weights, gate_up, down)
            return mixed
    order, back, ends = by_expert(experts, gate_up.shape[0])
    rows = x[order // experts.shape[1]]
    if weigh_inputs:
        rows = rows * weights.flatten()[order].unsqueeze(1).to(rows.dtype)
        weights = torch.ones_like(weights)
    first, second = (None, None) if biases is None else (bias.to(x.dtype)[experts.flatten()[order]] for bias in biases)
    hidden = _product(rows, gate_up, ends)
    found = _product(activation(hidden if first is None else hidden + first), down, ends)
    return gathered(found if second is None else found + second, back, weights)


def _product(x: Tensor, matrices: Tensor | PackedStack, ends: Tensor) -> Tensor:
    """Of each expert, its rows of ``x`` times the transpose of its matrix."""
    if isinstance(matrices, PackedStack):
        return matrices.product(x, ends)
    return grouped_linear(x, matrices.to(x.dtype), ends)


def gathered(found: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    """Each token's sum [N, hidden] of what was ``found`` [N * k, hidden] by its experts, with ``weights`` [N, k];
    ``back`` as of :class:`ByExpert`."""
    if found.is_cuda and found.dtype.itemsize <= 4 and not _wants_grad(found, weights):
        total: Tensor = _gathered(found, back, weights)
        return total
    own = found[back].view(*weights.shape, found.shape[-1])
    return (own * weights.unsqueeze(-1).to(found.dtype)).sum(1)


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


@custom_op("penstock::top_few", mutates_args=())
def _top_few(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    from penstock.ops.experts_kernel import largest

    return largest(scores.contiguous(), count)


@_top_few.register_fake
def _(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], count)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@custom_op("penstock::by_expert", mutates_args=())
def _by_expert(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    from penstock.ops.experts_kernel import ordered

    return ordered(experts.contiguous(), count)


@_by_expert.register_fake
def _(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    order, back = (experts.new_empty(experts.shape, dtype=torch.int32) for _ in range(2))
    return order, back, experts.new_empty(count, dtype=torch.int32)


@custom_op("penstock::gathered_experts", mutates_args=())
def _gathered(found: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    from penstock.ops.experts_kernel import gathered

    return gathered(found.contiguous(), back, weights.contiguous())


@_gathered.register_fake
def _(found: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    return found.new_empty(weights.shape[0], found.shape[1])


@custom_op("penstock::mixed_experts", mutates_args=())
def _mixed(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[N, hidden]: what the experts of each token make of it, times their weights, added up."""
    from penstock.ops.experts_kernel import mixed

    return mixed(x.contiguous(), experts.contiguous(), weights.contiguous(), gate_up, down)


@_mixed.register_fake
def _(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape)
