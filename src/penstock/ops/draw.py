"""Drawing tokens without writing the distribution down."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

#: Tokens whose weights are summed before anything is cumulated.
CHUNK = 512

#: Stands for a temperature of 0: the smallest by which a float32 can be divided without losing accuracy.
TINY = torch.finfo(torch.float32).tiny


def draw_softmax(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """A token int64 [R] from softmax(logits / temperature) of each row: the first at which the cumulated probability
    exceeds ``uniform``, up to rounding.

    The weights are summed by chunks, the chunk is found from the sums, and the token within its chunk, so that nothing
    of the vocabulary's size is cumulated. On CUDA the whole is compiled, and reads the logits once and writes nothing.

    Args:
        logits: [R, V], with a number above -inf in each row.
        temperature: float64 [R], 0 or above. One of 0 leaves the most probable tokens, and a ``uniform`` of 0 takes the
            first of those.
        uniform: float64 [R], in [0, 1).
    """
    return (_compiled() if logits.is_cuda else _draw)(logits, temperature, uniform)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_draw, dynamic=True)


def _draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    size, heat = logits.shape[-1], temperature.clamp(min=TINY).float().unsqueeze(-1)
    whole = size // CHUNK * CHUNK
    pieces = [logits[:, :whole].reshape(len(logits), -1, CHUNK)] if whole else []
    if whole < size:
        pieces.append(logits[:, whole:].unsqueeze(1))
    tops, sums = (torch.cat(parts, 1) for parts in zip(*(_summed(each, heat) for each in pieces), strict=True))
    # Counted from the largest, scores stay numbers however small the temperature is.
    top = tops.amax(-1, keepdim=True)
    reached = (sums * ((tops - top) / heat).exp()).double().cumsum(-1)
    # Rounding may lift an aim to the sum itself, which nothing exceeds.
    aim = (uniform.unsqueeze(-1) * reached[:, -1:]).minimum(_below(reached[:, -1:]))
    chunk = torch.searchsorted(reached, aim, right=True)
    passed = torch.where(chunk > 0, reached.gather(1, (chunk - 1).clamp(min=0)), 0)
    index = chunk * CHUNK + torch.arange(CHUNK, device=logits.device)
    scores = logits.gather(1, index.clamp(max=size - 1)).float().masked_fill(index >= size, -torch.inf)
    inside = ((scores - top) / heat).exp().double().cumsum(-1)
    rest = (aim - passed).minimum(_below(inside[:, -1:]))
    token = chunk * CHUNK + torch.searchsorted(inside, rest, right=True)
    # Of scores that are not numbers, some token is as good as another, but one it must be.
    return token.squeeze(-1).clamp(max=size - 1)


def _summed(scores: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
    """Of each chunk of ``scores`` [R, C, n]: the largest, and the sum of the weights counted from it; [R, C] each."""
    top = scores.amax(-1, keepdim=True).float()
    finite = torch.where(top > -torch.inf, top, 0.0)  # nothing is left of a chunk that is forbidden as a whole
    return top.squeeze(-1), ((scores.float() - finite) / heat.unsqueeze(-1)).exp().sum(-1)


def _below(total: Tensor) -> Tensor:
    return total * (1 - 2.0**-40)
