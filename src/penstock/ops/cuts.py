"""Cuts of the distribution, without sorting it.

Top-k, top-p and min-p, in this order, leave the tokens above some score, and of those that tie with it the first few.
So a cut row is told by two numbers: its floor, and how many ties stay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.ops.draw import MANY, TINY, Floor, chunked, draw_softmax

#: Of a vocabulary more than twice as large, so many tokens are looked at first where a share of probability is cut.
SHORTLIST = 1024


class Cuts(NamedTuple):
    """What R rows ask for, each field float64 [R].

    Attributes:
        temperature: 0 or above. A row whose temperature is 0 is not cut.
        top_k: keep so many of the most probable tokens, and those that tie with the last; 0 keeps all.
        top_p: keep the most probable tokens whose probabilities, of those that are left, reach it together; 1 keeps
            all.
        min_p: keep tokens of at least this share of the most probable one's probability; 0 keeps all.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def draw_cut(logits: Tensor, draws: Tensor) -> Tensor:
    """A token int64 [R] for each row of ``logits`` [R, V], drawn from what its cuts leave: see :func:`draw_softmax`.
    ``draws`` float64 [5, R] are the fields of :class:`Cuts`, and the uniform numbers."""
    if not logits.is_cuda and not draws[0].any():  # the largest is found much faster than a token is drawn
        return logits.argmax(-1)
    return draw_softmax(logits, draws[0], draws[4], floor_of(logits, draws[:4]))


def draw_uncut(logits: Tensor, draws: Tensor) -> Tensor:
    """What :func:`draw_cut` gives where nothing is cut, to the last bit, without looking for floors."""
    return draw_softmax(logits, draws[0], draws[4])


def cut_softmax(logits: Tensor, cuts: Tensor) -> Tensor:
    """The distributions float32 [R, V] that :func:`draw_cut` draws from, given ``logits`` [R, V] and ``cuts`` float64
    [4, R], the fields of :class:`Cuts`. With a temperature of 0, tokens that tie for the first place share it."""
    floor, scores = floor_of(logits, cuts), logits.float()
    heat = cuts[0].clamp(min=TINY).float().unsqueeze(-1)
    weights = ((scores - scores.amax(-1, keepdim=True)) / heat).exp()
    if floor is not None:
        least = floor.score.unsqueeze(-1)
        tied = scores == least
        late = tied.cumsum(-1) > floor.ties.unsqueeze(-1)
        weights = weights.masked_fill((scores < least) | (tied & late), 0)
    return weights / weights.sum(-1, keepdim=True)


def floor_of(logits: Tensor, cuts: Tensor) -> Floor | None:
    """The floor under the tokens that ``cuts`` [4, R], the fields of :class:`Cuts`, leave of ``logits`` [R, V]; on a
    CPU None where nothing is cut.

    On CUDA nothing waits for the device, and a row that is not cut costs next to nothing.
    """
    if logits.is_cuda:
        from penstock.ops.cuts_kernel import floors

        return Floor(*floors(logits.contiguous(), cuts.contiguous()))
    temperature, top_k, top_p, min_p = cuts
    kinds = torch.where(temperature > 0, 1 * (top_k > 0) + 2 * (top_p < 1) + 4 * (min_p > 0), 0)
    if not kinds.any():
        return None
    floor = Floor(torch.full((len(logits),), -torch.inf), torch.full((len(logits),), MANY))
    for kind in sorted(set(kinds.tolist())):
        if kind:
            # A row's numbers do not depend on what others ask for: sums over k tokens would, by the largest k.
            rows = (kinds == kind).nonzero().squeeze(-1)
            those = logits if len(rows) == len(logits) else logits[rows]
            own = _floor(those.float(), Cuts(*cuts[:, rows]), kind & 1 > 0, kind & 2 > 0)
            floor.score[rows], floor.ties[rows] = own
    return floor


def _floor(scores: Tensor, cuts: Cuts, by_k: bool, by_p: bool) -> Floor:
    """The floor of rows that are all cut by top-k or none, and all by top-p or none."""
    top, heat = scores.amax(-1), cuts.temperature.clamp(min=TINY)
    score, ties = torch.full_like(top, -torch.inf), torch.full((len(scores),), MANY)
    if by_k:
        limit = cuts.top_k.long().clamp(max=scores.shape[-1]).unsqueeze(-1)
        ranked = scores.topk(int(limit.max()), -1).values
        score = ranked.gather(-1, limit - 1).squeeze(-1)
        if by_p:
            ranked = ranked.masked_fill(ranked < score.unsqueeze(-1), -torch.inf)
            weights = _weights(ranked, top, heat).double()
            above = weights.masked_fill(ranked <= score.unsqueeze(-1), 0)
            tied = (scores == score.unsqueeze(-1)).sum(-1)
            # Cumulated, since a plain sum may depend on how many zeros are behind.
            whole = above.cumsum(-1)[:, -1] + tied * _weights(score.unsqueeze(-1), top, heat).squeeze(-1)
            score, ties = _reached(ranked, weights, cuts.top_p * whole)
    elif by_p:
        score, ties = _share(scores, top, heat, cuts.top_p)
    least = (top.double() + heat * cuts.min_p.log()).float()
    return Floor(torch.maximum(score, least), torch.where(least > score, MANY, ties))


def _share(scores: Tensor, top: Tensor, heat: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The floor under the tokens that reach a ``share`` [R] of the probability together, of all of ``scores`` [R, V]:
    as a score [R], and how many that tie with it stay [R]."""
    size = scores.shape[-1]
    aim = share * _summed(_weights(scores, top, heat))
    # Of a large vocabulary, a small part nearly always reaches the share.
    ranked = scores.topk(SHORTLIST if size > 2 * SHORTLIST else size, -1).values
    weights = _weights(ranked, top, heat).double()
    score, ties = _reached(ranked, weights, aim)
    short = (weights.cumsum(-1)[:, -1] < aim).nonzero().squeeze(-1)
    if len(short) and ranked.shape[-1] < size:
        whole = scores[short].sort(-1, descending=True).values
        all_weights = _weights(whole, top[short], heat[short]).double()
        score[short], ties[short] = _reached(whole, all_weights, aim[short])
    return score, ties


def _summed(weights: Tensor) -> Tensor:
    """The sums float64 [R] of ``weights`` float32 [R, V]. By chunks in float32 first: to widen each number takes twenty
    times as long."""
    return torch.cat([each.sum(-1) for each in chunked(weights)], -1).double().sum(-1)


def _reached(ranked: Tensor, weights: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
    """Where the ``weights`` of ``ranked`` scores [R, K], from the best one down, reach ``aim`` [R] together, at the
    latest at the last: that score, and how many of its ties it takes, which may be more than are ranked."""
    before = F.pad(weights.cumsum(-1)[:, :-1], (1, 0))
    # A token stays if those before it do not reach the aim yet, so that the first always stays.
    last = (before < aim.unsqueeze(-1)).sum(-1, keepdim=True).clamp(min=1) - 1
    score = ranked.gather(-1, last)
    first = (ranked > score).sum(-1, keepdim=True)
    missing = (aim.unsqueeze(-1) - before.gather(-1, first)) / weights.gather(-1, last)
    ties = missing.ceil().nan_to_num(nan=1, posinf=MANY).clamp(1, MANY)
    return score.squeeze(-1), ties.squeeze(-1).long()


def _weights(scores: Tensor, top: Tensor, heat: Tensor) -> Tensor:
    """What the probabilities of ``scores`` [R, n] are proportional to. Counted from the largest score ``top`` [R], they
    stay numbers however small the temperature ``heat`` [R] is."""
    return (scores - top.unsqueeze(-1)).div_(heat.float().unsqueeze(-1)).exp_()
