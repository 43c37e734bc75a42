"""Neighbours whose keys are alike become one."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import cosine_similarity

from penstock.policy import policy
from penstock.serve.kv.policies.contract import Budgeted, Cached, Kept, watched

#: Similarities that differ by less are equal.
GRAIN = 2.0**-12


@policy("kv.policy", "kv_merger", papers=[287])
class KVMerger(Budgeted):
    """Merges runs of neighbouring tokens whose keys are alike, and evicts nothing.

    From the paper [287]: sets of consecutive tokens by the cosine similarity of their keys; within a set, keys and
    values are averaged with the weights of a Gaussian kernel around the key of a pivot, the token that drew the most
    attention; the newest tokens stay as they are. Our reading: the threshold of the similarity is the one that just
    meets the budget, in each head, and the kernel is as wide as the mean distance to the pivot over the square root of
    two. A merged token counts as one in later attention, whatever it was merged of, as in the paper.

    Attributes:
        recent: how many of the newest tokens are not merged.
        window: how many of the last queries say which token is the pivot.
    """

    recent: PositiveInt = 16
    window: PositiveInt = 16

    @property
    def watches(self) -> int:
        return self.window

    @property
    def least(self) -> int:
        return self.recent + 1

    def compress(self, cached: Cached, count: int) -> Kept:
        runs = self.runs(cached.keys.float(), count)
        weights = kernel(cached.keys.float(), watched(cached).sum(-2), runs, count)
        keys, values = (mean_of_runs(each, weights, runs, count) for each in (cached.keys, cached.values))
        return Kept(keys, values)

    def runs(self, keys: Tensor, count: int) -> Tensor:
        """The number of the run of each token, int64 [*, n], of ``count`` in all: the neighbours that are the most
        alike are linked, the earlier of equal ones."""
        length = keys.shape[-2]
        # The same two tokens are as alike wherever they stand, in the first layer, up to rounding: they must be equal.
        alike = (cosine_similarity(keys[..., :-1, :], keys[..., 1:, :], -1) / GRAIN).round()
        alike[..., length - 1 - self.recent :] = -torch.inf
        order = alike.sort(dim=-1, descending=True, stable=True).indices
        begins = torch.ones(keys.shape[:-1], dtype=torch.int64, device=keys.device)
        begins[..., 1:].scatter_(-1, order[..., : length - count], 0)
        return begins.cumsum(-1) - 1


def kernel(keys: Tensor, attention: Tensor, runs: Tensor, count: int) -> Tensor:
    """The weight of each token in its run, float32 [*, n], of which those of a run sum to one."""
    most = attention.new_full((*attention.shape[:-1], count), -torch.inf).scatter_reduce(-1, runs, attention, "amax")
    places = torch.arange(attention.shape[-1], device=runs.device).expand_as(runs)
    candidates = places.where(attention == most.take_along_dim(runs, -1), places.shape[-1])
    first = candidates.new_full(most.shape, places.shape[-1]).scatter_reduce(-1, runs, candidates, "amin")
    pivots = keys.take_along_dim(first.take_along_dim(runs, -1).unsqueeze(-1), -2)
    distances: Tensor = torch.linalg.vector_norm(keys - pivots, dim=-1)
    sizes = _sums(torch.ones_like(distances), runs, count)
    widths = (_sums(distances, runs, count) / sizes / 2**0.5).take_along_dim(runs, -1)
    weights = (-(distances**2) / (2 * widths**2).clamp(min=torch.finfo(torch.float32).tiny)).exp()
    return weights / _sums(weights, runs, count).take_along_dim(runs, -1)


def mean_of_runs(rows: Tensor, weights: Tensor, runs: Tensor, count: int) -> Tensor:
    """The weighted mean of the ``rows`` [*, n, D] of each run: [*, count, D]."""
    weighted = rows.float() * weights.unsqueeze(-1)
    sums = weighted.new_zeros(*rows.shape[:-2], count, rows.shape[-1])
    return sums.scatter_add(-2, runs.unsqueeze(-1).expand_as(rows), weighted).to(rows.dtype)


def _sums(values: Tensor, runs: Tensor, count: int) -> Tensor:
    return values.new_zeros(*values.shape[:-1], count).scatter_add(-1, runs, values)
