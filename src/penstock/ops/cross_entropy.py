"""Cross-entropy of a linear head, without ever holding the logits of more than a chunk of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

#: Targets with this value are not predicted.
IGNORE = -100


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 2048, cap: float | None = None
) -> Tensor:
    """Summed cross-entropy of ``hidden @ weight.T`` against ``targets``, in nats.

    Where gradients are wanted they are computed in the forward pass, chunk by chunk, while each chunk's logits exist:
    logits are computed once, and at most ``chunk`` rows of them are alive. On the CPU, rows that are not predicted have
    no logits.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: int64 [N]; :data:`IGNORE` marks tokens that count nothing.
        chunk: tokens at a time.
        cap: logits x become cap tanh(x / cap).

    Returns:
        A scalar, float32 (float64 for float64 inputs). Divide by the number of predicted tokens for the mean.
    """
    hidden, targets, _ = _predicted(hidden, targets)
    if torch.is_grad_enabled():
        learnt = weight.requires_grad  # a frozen head needs no gradient, which is as much work as its logits
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, chunk, cap, learnt)  # type: ignore[no-untyped-call]
        return loss
    pieces = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    return torch.stack([_Scored.of(F.linear(rows, weight), wanted, cap).loss() for rows, wanted in pieces]).sum()


def linear_log_probabilities(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 2048, cap: float | None = None
) -> Tensor:
    """The log-probability of each target, float32 [N], 0 for :data:`IGNORE`; arguments as of
    :func:`linear_cross_entropy`. Logits are computed again in the backward pass, ``chunk`` rows at a time."""
    count = len(targets)
    hidden, targets, kept = _predicted(hidden, targets)
    pieces = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    found = torch.cat([recompute(_picked, rows, weight, wanted, cap, use_reentrant=False) for rows, wanted in pieces])
    return found if kept is None else found.new_zeros(count).index_add(0, kept, found)


def _predicted(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows that are predicted, and their places; all of them, and None, where there are no others, where counting
    them would wait for a device, and where compiled code has one shape for any."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return hidden, targets, None
    kept = (targets != IGNORE).nonzero().flatten()
    if len(kept) == len(targets):
        return hidden, targets, None
    return hidden.index_select(0, kept), targets.index_select(0, kept), kept


def _picked(rows: Tensor, weight: Tensor, wanted: Tensor, cap: float | None) -> Tensor:
    return _Scored.of(F.linear(rows, weight), wanted, cap).log_probabilities()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, cap: float | None, learnt: bool
    ) -> Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        grads_hidden = []
        grad_weight = torch.zeros(weight.shape if learnt else (), dtype=accumulate, device=weight.device)
        for rows, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            logits = F.linear(rows, weight)
            scored = _Scored.of(logits, wanted, cap)
            loss = loss + scored.loss()
            grad_logits = scored.gradient().to(logits.dtype)
            grads_hidden.append(grad_logits @ weight)
            if learnt:
                grad_weight += grad_logits.T @ rows
        ctx.learnt = learnt
        ctx.save_for_backward(torch.cat(grads_hidden), grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        for_weight = grad_weight * grad.to(grad_weight.dtype) if ctx.learnt else None
        return grad_hidden * grad.to(grad_hidden.dtype), for_weight, None, None, None, None


class _Scored(NamedTuple):
    """Logits of some rows, float32 or wider, beside what is predicted."""

    scores: Tensor
    normalizer: Tensor
    labels: Tensor
    counted: Tensor
    cap: float | None

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, cap: float | None) -> _Scored:
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        labels = targets.clamp(min=0).unsqueeze(1)
        return cls(scores, scores.logsumexp(1, keepdim=True), labels, targets != IGNORE, cap)

    def loss(self) -> Tensor:
        """The summed cross-entropy."""
        return -self.log_probabilities().sum()

    def log_probabilities(self) -> Tensor:
        """Those of the targets, 0 for what is not predicted."""
        return (self.scores.gather(1, self.labels) - self.normalizer).squeeze(1) * self.counted

    def gradient(self) -> Tensor:
        """Its gradient in the logits, which takes the place of :attr:`scores`: they are large."""
        slope = None if self.cap is None else 1 - (self.scores / self.cap).square()
        gradient = self.scores.sub_(self.normalizer).exp_()
        gradient.scatter_add_(1, self.labels, gradient.new_full(self.labels.shape, -1.0))
        if slope is not None:
            gradient.mul_(slope)
        return gradient.mul_(self.counted.unsqueeze(1))
