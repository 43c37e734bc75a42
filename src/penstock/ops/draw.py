"""Drawing tokens without writing the distribution down."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

#: Tokens whose weights are summed before anything is cumulated.
CHUNK = 512


def draw_softmax(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """A token int64 [R] from softmax(logits / temperature) of each row: the first at which the cumulated probability
    exceeds ``uniform``, up to rounding.

    The weights are summed by chunks, the chunk is found from the sums, and the token within its chunk, so that nothing
    of the vocabulary's size is cumulated. On CUDA the whole is compiled, and reads the logits and writes nothing.

    Args:
        logits: [R, V], with a number above -inf in each row.
        temperature: float32 [R], above 0.
        uniform: float64 [R], in [0, 1).
    """
    return (_compiled() if logits.is_cuda else _draw)(logits, temperature, uniform)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_draw, dynamic=True)


def _draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    size = logits.shape[-1]
    top = logits.amax(-1, keepdim=True).float()
    heat = temperature.unsqueeze(-1)

    def weights(scores: Tensor) -> Tensor:
        # Counted from the largest, scores stay numbers however small the temperature is.
        return ((scores.float() - top) / heat).exp()

    every = weights(logits)
    whole = size // CHUNK * CHUNK
    sums = [every[:, :whole].reshape(len(every), -1, CHUNK).sum(-1)] if whole else []
    if whole < size:
        sums.append(every[:, whole:].sum(-1, keepdim=True))
    reached = torch.cat(sums, 1).double().cumsum(-1)
    # Rounding may lift an aim to the sum itself, which nothing exceeds.
    aim = (uniform.unsqueeze(-1) * reached[:, -1:]).minimum(_below(reached[:, -1:]))
    chunk = torch.searchsorted(reached, aim, right=True)
    passed = torch.where(chunk > 0, reached.gather(1, (chunk - 1).clamp(min=0)), 0)
    index = chunk * CHUNK + torch.arange(CHUNK, device=logits.device)
    inside = weights(logits.gather(1, index.clamp(max=size - 1))).masked_fill(index >= size, 0).double().cumsum(-1)
    rest = (aim - passed).minimum(_below(inside[:, -1:]))
    return (chunk * CHUNK + torch.searchsorted(inside, rest, right=True)).squeeze(-1)


def _below(total: Tensor) -> Tensor:
    return total * (1 - 2.0**-40)
