"""Decoding whose bits do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.models.adapters.routed import routed
from penstock.models.decoder import Attention, Decoder, FeedForward, MixtureOfExperts
from penstock.models.linear import Linear
from penstock.models.norms import RMSNorm
from penstock.models.rotary import Rotary
from penstock.models.routers.contract import Routing
from penstock.ops.experts import by_expert, gathered
from penstock.ops.invariant import (
    in_pieces,
    invariant_grouped_linear,
    invariant_linear,
    invariant_rms_norm,
    invariant_swiglu,
    invariant_turns,
)
from penstock.ops.rotary import rotate, rotates_natively


def make_invariant(model: Decoder) -> Decoder:
    """Makes ``model`` compute each token's hidden states and logits with the same bits whatever else is computed with
    it; returns the model itself, whose modules keep their weights.

    Promised, for inference in eager mode (or in CUDA graphs of it, but not after ``torch.compile``), with the attention
    ``attention.paged/invariant`` and the same dtype, device and versions of software: the logits after a token depend
    on the tokens before it alone. Not on what else is in the batch, on how a prompt was cut into chunks, on whether
    keys and values were computed in a prompt or while decoding, now, for another request or once more after a
    preemption; nor, on CPUs, on the number of threads.

    It costs the choice of the fastest kernel for each number of rows. There are no gradients.

    Raises:
        UsageError: the model has parts whose sums are not known to be in one order.
    """
    config, moe = model.config, model.config.moe
    unknown = [name for name, usual in USUAL.items() if getattr(config, name) not in usual]
    unknown += [f"moe.{name}" for name in ("expert_bias", "clamp", "weigh_inputs") if moe and getattr(moe, name)]
    if unknown:
        raise UsageError(
            f"a model with such {', '.join(unknown)} cannot be computed with the same bits in any batch",
            hint="Leave out deterministic.",
        )
    if next(routed(model), None) is not None:
        raise UsageError(
            "an adapter that adds something else for each token cannot be computed with the same bits in any batch",
            hint="Leave out deterministic.",
        )
    for module in model.modules():
        kind = KINDS.get(type(module))
        if kind is not None:
            module.__class__ = kind
    return model


class InvariantLinear(Linear):
    """A linear layer with sums in one order."""

    def forward(self, x: Tensor) -> Tensor:
        return invariant_linear(x, self.weight, self.bias)


class InvariantRMSNorm(RMSNorm):
    """A norm with sums in one order."""

    def forward(self, x: Tensor) -> Tensor:
        return invariant_rms_norm(x, self.weight.to(x.dtype), self.eps)


class InvariantRotary(Rotary):
    """Cosines and sines by the same instructions for every position."""

    def turns(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        return invariant_turns(angles)


class InvariantAttention(Attention):
    """Attention whose norms of queries and keys have sums in one order."""

    def rotate(self, query: Tensor, key: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # There it is one kernel, with a program for each token.
        if query.is_cuda or rotates_natively(query, key, turns[0], self.interleaved):
            return super().rotate(query, key, turns)
        if self.norms == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, *turns, self.interleaved), rotate(key, *turns, self.interleaved)


class InvariantFeedForward(FeedForward):
    """SwiGLU by the same instructions for every row."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(invariant_swiglu(self.gate_up(x)))
        return out


class InvariantExperts(MixtureOfExperts):
    """Experts with sums in one order; tokens are routed in pieces of one shape."""

    def route(self, flat: Tensor) -> Routing:
        of_piece: list[Routing] = []

        def route(rows: Tensor) -> tuple[Tensor, Tensor]:
            of_piece.append(self.policy.route(rows, self.selection_bias))
            return of_piece[-1].experts, of_piece[-1].weights

        logits = self.router(flat)
        experts, weights = in_pieces(route, self.shaken(logits))
        return Routing(experts, weights, torch.cat([each.probabilities for each in of_piece]))

    def mixed(self, flat: Tensor, routing: Routing) -> Tensor:
        order, back, ends = by_expert(routing.experts, self.experts)
        rows = flat[order // routing.experts.shape[1]]
        hidden = invariant_swiglu(invariant_grouped_linear(rows, self.gate_up.to(rows.dtype), ends))
        return gathered(invariant_grouped_linear(hidden, self.down.to(rows.dtype), ends), back, routing.weights)

    def share(self, flat: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        return in_pieces(lambda rows: (rows.sigmoid(),), gate(flat))[0]


#: What a model that can be made invariant may have: all else would be computed by kernels that depend on the batch.
USUAL: dict[str, tuple[object, ...]] = {
    "norm": ("rms",),
    "qk_norm": (None, "head"),
    "latent": (None,),
    "temperature": (None,),
    "activation": ("silu",),
    "gated": (True,),
    "logits_cap": (None,),
}

#: What each module becomes.
KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: InvariantLinear,
    Linear: InvariantLinear,
    RMSNorm: InvariantRMSNorm,
    Rotary: InvariantRotary,
    Attention: InvariantAttention,
    FeedForward: InvariantFeedForward,
    MixtureOfExperts: InvariantExperts,
}
