"""Drawing tokens without writing the distribution down."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.core.devices import lasting
from penstock.ops.pieces import pieces

#: Tokens whose weights are summed before anything is cumulated.
CHUNK = 512

#: Stands for a temperature of 0: the smallest by which a float32 can be divided without losing accuracy.
TINY = torch.finfo(torch.float32).tiny

#: How close an aim may come to the sum of all weights, as a share of it.
BELOW = 1 - 2.0**-40

#: More ties than any vocabulary has.
MANY = 2**31 - 1


class Floor(NamedTuple):
    """What cuts leave of R rows: the scores above ``score`` float32 [R], and the first ``ties`` int64 [R] of those that
    equal it, which may be more than there are."""

    score: Tensor
    ties: Tensor


def draw_softmax(logits: Tensor, temperature: Tensor, uniform: Tensor, floor: Floor | None = None) -> Tensor:
    """A token int64 [R] from softmax(logits / temperature) of each row, or of what is left of it above a ``floor``: the
    first at which the cumulated probability exceeds ``uniform``, up to rounding.

    The weights are summed by chunks, the chunk is found from the sums, and the token within its chunk, so that nothing
    of the vocabulary's size is cumulated. On CUDA two kernels do it; on a CPU it goes by a few rows at a time.

    Args:
        logits: [R, V], with a number above -inf in each row.
        temperature: float64 [R], 0 or above. One of 0 leaves the most probable tokens, and a ``uniform`` of 0 takes the
            first of those.
        uniform: float64 [R], in [0, 1).
        floor: of each row; None where nothing is cut.
    """
    if logits.is_cuda:
        from penstock.ops.draw_kernel import drawn

        # Whether something is cut must not decide how sums round.
        score, ties = floor or _nothing_cut(1 << (len(logits) - 1).bit_length(), logits.device)
        return drawn(logits, temperature, uniform, score, ties, chunk=CHUNK, tiny=TINY, below=BELOW)
    parts = pieces(logits, temperature, uniform, *(floor or ()))
    return torch.cat([_draw(scores, heat, aim, Floor(*cut) if cut else None) for scores, heat, aim, *cut in parts])


@lasting
def _nothing_cut(rows: int, device: torch.device) -> Floor:
    """The floor under all tokens of up to so many rows."""
    score = torch.full((rows,), -torch.inf, device=device)
    return Floor(score, torch.full((rows,), MANY, device=device))


def _draw(logits: Tensor, temperature: Tensor, uniform: Tensor, floor: Floor | None) -> Tensor:
    size, heat = logits.shape[-1], temperature.clamp(min=TINY).float().unsqueeze(-1)
    parts = zip(*(_summed(each, heat, floor) for each in chunked(logits)), strict=True)
    tops, sums, ties = (torch.cat(part, 1) for part in parts)
    # Counted from the largest, scores stay numbers however small the temperature is.
    top = tops.amax(-1, keepdim=True)
    sums = sums * ((tops - top) / heat).exp()
    if floor is not None:
        before = ties.cumsum(-1) - ties
        stay = (floor.ties.unsqueeze(-1) - before).clamp(min=0).minimum(ties)
        sums = sums + stay * ((floor.score.unsqueeze(-1) - top) / heat).exp()
    reached = sums.double().cumsum(-1)
    # Rounding may lift an aim to the sum itself, which nothing exceeds.
    aim = (uniform.unsqueeze(-1) * reached[:, -1:]).minimum(_below(reached[:, -1:]))
    chunk = torch.searchsorted(reached, aim, right=True)
    passed = torch.where(chunk > 0, reached.gather(1, (chunk - 1).clamp(min=0)), 0)
    index = chunk * CHUNK + torch.arange(CHUNK, device=logits.device)
    scores = logits.gather(1, index.clamp(max=size - 1)).float().masked_fill(index >= size, -torch.inf)
    if floor is not None:
        least, tied = floor.score.unsqueeze(-1), scores.eq(floor.score.unsqueeze(-1))
        late = before.gather(1, chunk.clamp(max=before.shape[1] - 1)) + tied.cumsum(-1) > floor.ties.unsqueeze(-1)
        scores = scores.masked_fill((scores < least) | (tied & late), -torch.inf)
    inside = ((scores - top) / heat).exp().double().cumsum(-1)
    rest = (aim - passed).minimum(_below(inside[:, -1:]))
    token = chunk * CHUNK + torch.searchsorted(inside, rest, right=True)
    # Of scores that are not numbers, some token is as good as another, but one it must be.
    return token.squeeze(-1).clamp(max=size - 1)


def chunked(rows: Tensor) -> list[Tensor]:
    """``rows`` [R, V] in chunks [R, C, CHUNK], and what is left over [R, 1, V % CHUNK]; each only if there is any."""
    size = rows.shape[-1]
    whole = size // CHUNK * CHUNK
    parts = [rows[:, :whole].reshape(len(rows), -1, CHUNK)] if whole else []
    return parts if whole == size else [*parts, rows[:, whole:].unsqueeze(1)]


def _summed(scores: Tensor, heat: Tensor, floor: Floor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each chunk of ``scores`` [R, C, n]: the largest, the sum of the weights above the ``floor`` counted from it,
    and how many are at the floor; [R, C] each."""
    top = scores.amax(-1, keepdim=True).float()
    finite = torch.where(top > -torch.inf, top, 0.0)  # nothing is left of a chunk that is forbidden as a whole
    if floor is None:
        weights = (scores.float() - finite).div_(heat.unsqueeze(-1)).exp_()
        return top.squeeze(-1), weights.sum(-1), torch.zeros_like(top).squeeze(-1)
    return top.squeeze(-1), *_left(scores, top, heat, floor)


def _left(scores: Tensor, top: Tensor, heat: Tensor, floor: Floor) -> tuple[Tensor, Tensor]:
    """The last two of what :func:`_summed` gives, to the last bit, with a look at those chunks alone of which something
    is left: most are below the floor as a whole."""
    row, chunk = (top.squeeze(-1) >= floor.score.unsqueeze(-1)).nonzero(as_tuple=True)
    those, highest, least = scores[row, chunk].float(), top[row, chunk], floor.score[row].unsqueeze(-1)
    finite = torch.where(highest > -torch.inf, highest, 0.0)
    weights = (those - finite).div_(heat[row]).exp_()
    above = torch.zeros(top.shape[:2], dtype=torch.float32)
    ties = torch.zeros(top.shape[:2], dtype=torch.int64)
    above[row, chunk] = torch.where(those > least, weights, 0.0).sum(-1)
    ties[row, chunk] = (those == least).sum(-1)
    return above, ties


def _below(total: Tensor) -> Tensor:
    return total * BELOW
