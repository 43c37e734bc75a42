"""How much of their attention tokens pay to the parts of the text before them."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from penstock.ops.attention import Extras, causal_mask

#: Scores that are in memory at a time.
SCORES = 1 << 22


@dataclasses.dataclass(eq=False)
class Weighed:
    """Tokens of a batch whose attention is weighed, and what came out of it.

    Attributes:
        sequence: its number in the batch.
        first, last: the places of the tokens in it: [first, last), all of them new.
        bounds: where the parts of the text begin that are looked at, ascending, and behind the last one.
        sums: float32 [last - first, parts], the share that goes to each part, averaged over query heads and layers,
            once a pass has computed them; None before.
    """

    sequence: int
    first: int
    last: int
    bounds: tuple[int, ...]
    sums: Tensor | None = None

    def add(self, shares: Tensor) -> None:
        """Adds what a layer has to the average."""
        self.sums = shares if self.sums is None else self.sums + shares


def shares(query: Tensor, keys: Tensor, weighed: Weighed, scale: float, window: int | None, extras: Extras) -> Tensor:
    """Of the tokens with the ``query`` [t, H, D], how much of their attention to ``keys`` [last, K, D] goes to each
    part: float32 [t, parts], averaged over the heads."""
    wide, places = torch.promote_types(query.dtype, torch.float32), torch.arange(len(keys), device=query.device)
    columns = keys.to(wide).permute(1, 2, 0)  # [K, D, n]
    rows, found = max(1, SCORES // (query.shape[1] * len(keys))), []
    for own, at in zip(torch.split(query, rows), torch.split(places[weighed.first : weighed.last], rows), strict=True):
        grouped = (own.to(wide) * scale).view(len(own), len(columns), -1, own.shape[-1]).permute(1, 2, 0, 3)
        scores = torch.bmm(grouped.flatten(1, 2), columns).view(-1, len(own), len(keys))  # [H, t, n]
        if extras.cap is not None:
            scores = extras.cap * torch.tanh(scores / extras.cap)
        # Of the keys before the first of the tokens, all are seen where nothing bounds what is.
        first = 0 if window is not None or extras.chunk is not None else weighed.first
        scores[..., first:].masked_fill_(~causal_mask(at, places[first:], window, extras.chunk), -torch.inf)
        if extras.sinks is not None:
            scores = torch.cat([scores, extras.sinks.to(wide).view(-1, 1, 1).expand(-1, len(own), 1)], -1)
        weights = scores.softmax(-1).mean(0)
        parts = [weights[:, begin:end].sum(1) for begin, end in itertools.pairwise(weighed.bounds)]
        found.append(torch.stack(parts, 1).float())
    return torch.cat(found)
