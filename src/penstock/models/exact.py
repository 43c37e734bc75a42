"""Log-probabilities with the bits that a deterministic engine tells, of whole texts, from the weights of a trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.models.blank import assembled
from penstock.models.decoder import Decoder
from penstock.models.invariant import make_invariant
from penstock.models.paged import PagedTokens, cache_shape
from penstock.ops.logprobs import logprob_table
from penstock.ops.paged.contract import PagedBatch
from penstock.ops.paged.invariant import Invariant

#: Tokens whose scores are in memory together.
SCORED = 256


class ExactForward:
    """Computes the log-probabilities of texts as an engine with ``deterministic`` does, to the last bit, on the same
    device, in the same dtype and with the same versions of software: however the engine cut and shared prompts, and
    whatever else was in its batches, and whether it drafted. Where a trainer learns from what an engine generated, the
    ratio of both probabilities is 1 exactly, as long as the weights are the same.

    That holds for models that :func:`~penstock.models.invariant.make_invariant` knows, where the attention
    ``attention.paged/invariant`` serves the device. A forward pass that trains, and an engine that is free to choose
    its kernels, sum in orders that depend on the number of rows: they differ in the last bits. There are no gradients.

    Args:
        model: whose weights are shared, so that it may be trained meanwhile; the model itself stays as it is.
        block_size: of the engine: its blocks are where sums over keys are cut.

    Raises:
        UsageError: the model has parts whose sums are not known to be in one order.
    """

    def __init__(self, model: Decoder, block_size: int = 16) -> None:
        self._size = block_size
        self._model = make_invariant(assembled(model, dict(model.named_parameters()))).eval()

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """The log-probability of each of ``tokens`` but the first, given those before it: float32 [T - 1], on the CPU.

        Raises:
            UsageError: the attention does not serve the model.
        """
        model, count = self._model, len(tokens) - 1
        flat = torch.tensor(tokens, device=model.like.device)
        if count < 1:
            return torch.zeros(0)
        hidden = model(flat[:-1], self._context(count)).hidden
        # One row after the other: what a library makes of one may depend on how many there are.
        rows = (row for states in hidden.split(SCORED) for row in model.logits(states).float())
        told = [logprob_table(row.unsqueeze(0), token.view(1), 0) for row, token in zip(rows, flat[1:], strict=True)]
        return torch.cat(told)[:, 2].contiguous().view(torch.float32).cpu()

    def _context(self, count: int) -> PagedTokens:
        """The context of a text of ``count`` tokens, whose keys and values are in a memory of its own."""
        weight, blocks = self._model.like, -(-count // self._size)
        cache = Invariant().open(
            cache_shape(self._model.config, self._size, weight.dtype, weight.device, blocks=blocks)
        )
        cache.plan(
            PagedBatch(
                torch.tensor([0, count], dtype=torch.int32),
                torch.tensor([count], dtype=torch.int32),
                torch.arange(blocks, dtype=torch.int32).unsqueeze(0),
                torch.arange(count),
            )
        )
        return PagedTokens(torch.arange(count, device=weight.device), cache)
