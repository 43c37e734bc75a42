"""The passes of a sharded vocabulary ("Balancing Pipeline Parallelism with Vocabulary Parallelism").

Each device holds some rows of the input embedding and of the output layer's matrix. What a microbatch needs of them is
computed in passes; between two of them, every shard hears from all others:

======== ================================= ==================== ================================
barriers S sends                           N sends              T sends
======== ================================= ==================== ================================
3        maxima of scores                  sums of exponentials its part of the hidden gradient
2        normalizers                       (no such pass)       its part of the hidden gradient
1        normalizers, and its two terms of (no such pass)       nothing
         the hidden gradient
======== ================================= ==================== ================================

A shard's normalizer is z = log sum exp y over its own scores y, and the whole one Z = log sum exp z over all shards; so
its part of the softmax is that of its own scores, times exp(z - Z). That is the paper's Algorithm 1, whose maximum and
sum are here one number. Since the factor is one number for each token, it may as well come after the product with the
matrix, which is Algorithm 2. The loss needs the target's score too, which one of the shards has: it goes along. Here
all shards send to all, and the receiver adds up; the paper reduces in a ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.ops.cross_entropy import IGNORE
from penstock.pipeline.ir.schedule import Kind, Task

#: What S sends first: the normalizer and the target's score of each token.
STATISTICS = 2


def width(maker: Task, reader: Task, barriers: int, hidden: int) -> int:
    """Numbers for each token that ``maker`` sends to ``reader``, of which hidden states are ``hidden``."""
    if maker.kind is Kind.S:
        if reader.kind in (Kind.I, Kind.B):
            return STATISTICS + 2 * hidden
        return 1 if barriers == 3 else STATISTICS
    return 2 if maker.kind is Kind.N else hidden


def shard_rows(vocabulary: int, devices: int) -> list[range]:
    """The rows of each device: equal parts, to within one.

    Raises:
        UsageError: there are fewer rows than devices.
    """
    if vocabulary < devices:
        raise UsageError(
            f"a vocabulary of {vocabulary} cannot be sharded over {devices} devices",
            hint=f"Use at most {vocabulary} devices, or keep the vocabulary whole.",
        )
    cuts = [vocabulary * device // devices for device in range(devices + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts)]


class _Scored(NamedTuple):
    """What is kept of a microbatch's S.

    ``weights`` are the softmax of the shard's own scores, of which ``normalizer`` is that of the module's docstring.
    With three barriers they are the scores themselves, and after N exp(score - normalizer) with the maximum of all.
    """

    hidden: Tensor
    weights: Tensor
    normalizer: Tensor
    target: Tensor


class Shard:
    """One device's part of the vocabulary, and its passes.

    Args:
        barriers: 1, 2 or 3.
        rows: which rows of the vocabulary are here.
        embedding, head: [rows, hidden]; the same parameter where they are tied. Gradients are added to ``.grad``.
        batch: gives the tokens and the targets, integers [*T], of a microbatch, on the device.
        scale: of the summed cross-entropy in the loss: 1 over the number of predicted tokens for the mean.
    """

    def __init__(
        self,
        barriers: int,
        rows: range,
        embedding: Tensor,
        head: Tensor,
        batch: Callable[[int], tuple[Tensor, Tensor]],
        scale: float | Tensor,
    ) -> None:
        self._barriers, self._rows, self._embedding, self._head = barriers, rows, embedding, head
        self._batch, self._scale = batch, scale
        self._scored: dict[int, _Scored] = {}

    @torch.no_grad()
    def embed(self, microbatch: int) -> Tensor:
        """E: the embeddings [*T, hidden] of the tokens that are here, and zeros."""
        tokens, _ = self._batch(microbatch)
        row, here = self._place(tokens)
        return self._embedding[row] * here.unsqueeze(-1)

    def embedded(self, microbatch: int, gradient: Tensor) -> None:
        """G: the rows' gradients from that of the embeddings, [*T, hidden]."""
        tokens, _ = self._batch(microbatch)
        row, here = self._place(tokens)
        rows = torch.zeros_like(self._embedding).index_add_(0, row[here], gradient[here].to(self._embedding.dtype))
        torch.autograd.backward(self._embedding, rows)

    @torch.no_grad()
    def score(self, microbatch: int, hidden: Tensor) -> Tensor:
        """S: from the last hidden states [*T, hidden], what this shard sends, in :func:`width` numbers a token."""
        head = self._head.to(hidden.dtype)
        scores = hidden @ head.T
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        row, here = self._target(microbatch)
        target = scores.gather(-1, row.unsqueeze(-1)) * here.unsqueeze(-1)
        if self._barriers == 3:
            maximum = scores.amax(-1, keepdim=True)
            self._scored[microbatch] = _Scored(hidden, scores, maximum, target)
            return maximum
        normalizer = scores.logsumexp(-1, keepdim=True)
        weights = (scores - normalizer).exp()
        self._scored[microbatch] = _Scored(hidden, weights, normalizer, target)
        sent = [normalizer, target]
        if self._barriers == 1:
            sent += [weights.to(hidden.dtype) @ head, head[row] * here.unsqueeze(-1)]
        return torch.cat([part.to(scores.dtype) for part in sent], -1)

    @torch.no_grad()
    def normalize(self, microbatch: int, given: Sequence[Tensor]) -> Tensor:
        """N: from the maxima of all shards, this one's sums of exponentials and target scores."""
        hidden, scores, _, target = self._scored[microbatch]
        maximum = torch.stack(list(given)).amax(0)
        weights = (scores - maximum).exp()
        self._scored[microbatch] = _Scored(hidden, weights, maximum, target)
        return torch.cat([weights.sum(-1, keepdim=True), target], -1)

    @torch.no_grad()
    def differentiate(self, microbatch: int, given: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """T: from what all shards sent last, the loss of the microbatch, the same on all, and this shard's part of the
        gradient of the hidden states, unless S has sent it; adds the gradient of the matrix."""
        hidden, weights, own, _ = self._scored.pop(microbatch)
        if self._barriers == 3:
            total, target = torch.stack(list(given)).sum(0).chunk(2, -1)
            normalizer, softmax = own + total.log(), weights / total
        else:
            normalizer, target = _together(given)
            softmax = weights * (own - normalizer).exp()
        row, here = self._target(microbatch)
        softmax.scatter_add_(-1, row.unsqueeze(-1), -here.unsqueeze(-1).to(softmax.dtype))
        gradient = self._weighted(microbatch, softmax).to(hidden.dtype)
        matrix = gradient.flatten(0, -2).T @ hidden.flatten(0, -2)
        torch.autograd.backward(self._head, matrix.to(self._head.dtype))
        loss = self._weighted(microbatch, normalizer - target).sum()
        return loss, None if self._barriers == 1 else gradient @ self._head.to(hidden.dtype)

    def hidden_gradient(self, microbatch: int, given: Sequence[Tensor]) -> Tensor:
        """The gradient [*T, hidden] of the last hidden states, in the dtype of the messages, from what all shards sent
        for it."""
        if self._barriers > 1:
            return torch.stack(list(given)).sum(0)
        normalizer, _ = _together(given)
        gradient = torch.zeros((), dtype=normalizer.dtype, device=normalizer.device)
        for sent in given:
            expected, wanted = sent[..., STATISTICS:].chunk(2, -1)
            gradient = gradient + expected * (sent[..., :1] - normalizer).exp() - wanted
        return self._weighted(microbatch, gradient)

    def _weighted(self, microbatch: int, x: Tensor) -> Tensor:
        """``x``, [*T, any], times what each target counts in the loss."""
        _, targets = self._batch(microbatch)
        return x * (targets != IGNORE).unsqueeze(-1) * self._scale

    def _target(self, microbatch: int) -> tuple[Tensor, Tensor]:
        _, targets = self._batch(microbatch)
        return self._place(targets)

    def _place(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each of ``tokens`` here, or 0, and whether it is here."""
        here = (tokens >= self._rows.start) & (tokens < self._rows.stop)
        return torch.where(here, tokens - self._rows.start, 0), here


def _together(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The normalizer and the target's score over all shards, [*T, 1] each."""
    statistics = torch.stack([sent[..., :STATISTICS] for sent in given])
    return statistics[..., :1].logsumexp(0), statistics[..., 1:].sum(0)
