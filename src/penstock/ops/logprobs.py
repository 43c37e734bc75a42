"""Log-probabilities of tokens, and of the most probable ones beside them, as rows of integers."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.ops import native
from penstock.ops.pieces import pieces

SOURCE = Path(__file__).with_name("logprobs_kernel.cpp")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

#: Columns before the alternatives: the token, its rank, its log-probability, and entropy and certainty of the position.
FIXED = 5


def logprob_table(logits: Tensor, tokens: Tensor, most: int, spread: Tensor | None = None) -> Tensor:
    """The log-probabilities of ``tokens`` int64 [R] under softmax(``logits`` [R, V]), in one array, so that one copy
    brings them to the host: int32 [R, 5 + 2k], with k of ``most`` and V the smaller one.

    A row holds the token, its rank, which is 1 where no other is more probable, and as bits of fp32 its log-probability
    and the distribution's entropy and distance from the even one, KL(even || model), in nats; behind them the k most
    probable tokens, each a token and the bits of its log-probability. Entropy and distance are 0 but in the rows that
    ``spread`` bool [R] names. On CUDA the logits are read once, and a row does not depend on the others.
    """
    most = min(most, logits.shape[-1])
    if logits.is_cuda:
        wanted = torch.full_like(tokens, 2 * (most + 1))
        return wanted_table(logits, tokens, wanted if spread is None else wanted + spread, most)
    if logits.dtype in NAMES and logits.stride(-1) == 1 and native.serves(SOURCE):
        return _native_table(logits, tokens, most, spread)
    if spread is None:
        return torch.cat([_table(own, chosen, most, None) for own, chosen in pieces(logits, tokens)])
    return torch.cat([_table(own, chosen, most, asked) for own, chosen, asked in pieces(logits, tokens, spread)])


def _native_table(logits: Tensor, tokens: Tensor, most: int, spread: Tensor | None) -> Tensor:
    """:func:`logprob_table` on a CPU with a compiler, where each row is read twice, and nothing of its size written."""
    (rows, size), tokens = logits.shape, tokens.contiguous()
    table, bases = torch.empty(rows, FIXED, dtype=torch.int32), torch.empty(rows, 2, dtype=torch.float64)
    named = None if spread is None else spread.contiguous()
    _function(logits.dtype)(
        logits.data_ptr(), logits.stride(0), tokens.data_ptr(), None if named is None else named.data_ptr(),
        table.data_ptr(), bases.data_ptr(), rows, size, torch.get_num_threads(),
    )  # fmt: skip
    if not most:
        return table
    values, places = zip(*(own.topk(most, -1) for (own,) in pieces(logits)), strict=True)
    # To the last bit what is told of a token itself.
    top = (torch.cat(values).double() - bases[:, :1] - bases[:, 1:]).float()
    return torch.cat([table, torch.stack([torch.cat(places).int(), top.view(torch.int32)], -1).flatten(1)], -1)


@functools.cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    function: Any = getattr(native.load(SOURCE), f"tell_{NAMES[dtype]}")
    place, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [place, number, place, place, place, place, number, number, number]
    function.restype = None
    called: Callable[..., None] = function
    return called


def _table(logits: Tensor, tokens: Tensor, most: int, spread: Tensor | None) -> Tensor:
    """:func:`logprob_table` of a few rows."""
    scores, which = logits.float(), tokens.unsqueeze(-1)
    # Counted from the largest score, of which softmax loses nothing: its logarithm gives those of all the others, and
    # no second exponential is taken.
    gaps = scores - scores.amax(-1, keepdim=True)
    chances = gaps.softmax(-1)
    best = chances.amax(-1, keepdim=True).log()
    chosen = gaps.gather(-1, which) + best
    # A comparison that is written as numbers is much faster than one written as booleans.
    above = torch.gt(scores, scores.gather(-1, which), out=torch.empty_like(scores))
    rank = above.sum(-1, keepdim=True).int() + 1
    top = gaps.topk(most, -1)
    pairs = torch.stack([top.indices.int(), (top.values + best).view(torch.int32)], -1).flatten(1)
    shape = chosen.new_zeros(len(scores), 2)
    if spread is not None:
        shape = torch.where(spread.unsqueeze(-1), _spread(gaps, chances, best), shape)
    values = torch.cat([chosen, shape], -1).view(torch.int32)
    return torch.cat([which.int(), rank, values, pairs], -1)


def wanted_by(alternatives: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """What rows want to be told, int64 [R], as one number each: nothing (0) where ``alternatives`` int64 [R] is -1,
    else twice one more than these, and 1 more with how the row is ``spread`` bool [R]."""
    wanted: np.ndarray = np.where(alternatives < 0, 0, 2 * (alternatives + 1) + spread)
    return wanted


def wanted_table(logits: Tensor, tokens: Tensor, wanted: Tensor, most: int) -> Tensor:
    """What :func:`logprob_table` tells with ``most`` alternatives, in the rows and as far as :func:`it is wanted
    <wanted_by>`, int64 [R]; the rest of the array is of no meaning. Nothing waits for the device, so that it can be a
    part of a graph, whatever the rows want."""
    if logits.is_cuda:
        from penstock.ops.logprobs_kernel import logprob_rows

        return logprob_rows(logits.contiguous(), tokens, wanted, min(most, logits.shape[-1]), FIXED)
    table, columns = logprob_table(logits, tokens, most, wanted % 2 == 1), wanted // 2 * 2 + FIXED - 2
    there = torch.arange(table.shape[1]) < torch.where(wanted > 0, columns, 0).unsqueeze(-1)
    return torch.where(there, table, 0)


def _spread(gaps: Tensor, chances: Tensor, best: Tensor) -> Tensor:
    """Entropy and certainty [R, 2] of ``chances`` [R, V], given how far below the largest score all are, ``gaps``
    [R, V], and the logarithm of the largest chance, ``best`` [R, 1]."""
    # A token that cannot come adds nothing to the entropy, and its certainty is without bound.
    entropy = -best.squeeze(-1) - (chances * gaps.clamp(min=torch.finfo(gaps.dtype).min)).sum(-1)
    certainty = -best.squeeze(-1) - gaps.mean(-1) - math.log(gaps.shape[-1])
    return torch.stack([entropy, certainty], -1)
