"""Attention that reads some blocks of a text in place of all of it.

A text is cut into blocks of so many tokens, counted from its beginning. A token that *selects* reads a few of those up
to its own: the first ones, the newest ones, and of the others those whose mean key its queries like best. Which these
are follows from the text and the token's place alone: a block that could be chosen is whole, and stays as it is.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from penstock.ops.attention import attend_rows

#: Numbers of the keys that are in memory at a time.
NUMBERS = 1 << 24


@dataclasses.dataclass(frozen=True)
class BlockSelection:
    """Which blocks a token reads.

    Attributes:
        block: tokens of a block.
        budget: up to 1 the share of the tokens up to itself that a token reads, above it their number; in whole blocks,
            rounded up.
        first: how many of the first blocks are always read.
        newest: how many of the newest ones are, its own among them; 1 or more.
    """

    block: int
    budget: float
    first: int
    newest: int

    def blocks(self, tokens: int) -> int:
        """How many blocks are read of so many ``tokens``; the last of them may not be whole."""
        wanted = self.budget * tokens if self.budget <= 1 else self.budget
        return min(max(math.ceil(wanted / self.block), self.first + self.newest), -(-tokens // self.block))

    def reads(self, tokens: int) -> tuple[int, int]:
        """Of so many ``tokens``, how many are read, and how many mean keys are for choosing them: none where there is
        nothing to choose."""
        whole = -(-tokens // self.block)
        chosen = self.blocks(tokens)
        if chosen == whole:
            return tokens, 0
        choice = whole - self.first - self.newest if chosen > self.first + self.newest else 0
        return tokens - (whole - chosen) * self.block, choice

    def chosen(self, query: Tensor, keys: Tensor, first: int) -> Tensor:
        """The blocks that tokens read: int64 [T, K, m], ascending. Behind those of a token that reads fewer than m
        stands the number of all blocks.

        Args:
            query: [T, H, D], of the tokens at the places ``first``, ``first`` + 1, ... A block is worth what
                that query head of a KV head gives it that gives it the most; of equal ones, the earlier is read.
            keys: [S, K, D], of all tokens up to the last of these.
        """
        every, device = -(-len(keys) // self.block), query.device
        own = torch.arange(first, first + len(query), device=device).view(-1, 1, 1) // self.block
        number, scores = torch.arange(every, device=device), self._scores(query, keys, first)
        scores = scores.masked_fill((number < self.first) | (number > own - self.newest), math.inf)
        scores = scores.masked_fill(number > own, -math.inf)
        counts = torch.tensor([self.blocks(tokens) for tokens in range(first + 1, first + len(query) + 1)])
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices[..., : int(counts.max())]
        beyond = torch.arange(ranked.shape[-1]) >= counts.view(-1, 1, 1)
        return ranked.masked_fill(beyond.to(device), every).sort(-1).values

    def _scores(self, query: Tensor, keys: Tensor, first: int) -> Tensor:
        """What all blocks are worth to tokens, as of :meth:`chosen`: [T, K, C], and 0 of those that nobody chooses
        among."""
        (count, _, dim), (length, heads, _) = query.shape, keys.shape
        every, begin = -(-length // self.block), self.first
        end = max(begin, (length - 1) // self.block - self.newest + 1)
        if not any(self.reads(tokens)[1] for tokens in range(first + 1, first + count + 1)):
            end = begin
        wide = torch.promote_types(query.dtype, torch.float32)
        means = keys[begin * self.block : end * self.block].to(wide).view(-1, self.block, heads, dim).mean(1)
        scores = torch.einsum("tkgd,ckd->tkgc", query.to(wide).view(count, heads, -1, dim), means).amax(2)
        return torch.nn.functional.pad(scores, (begin, every - end))[..., :every]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, first: int, scale: float) -> Tensor:
        """Attention [T, H, D] of the tokens at the places ``first``, ``first`` + 1, ..., with the ``query`` [T, H, D],
        to what they read of the ``keys`` and ``values`` [S, K, D] of all tokens up to the last of them."""
        count, heads, dim = len(query), keys.shape[1], query.shape[-1]
        most = self.blocks(len(keys)) * self.block
        rows, found = max(1, NUMBERS // (most * heads * dim)), []
        keys_by_head, values_by_head = (each.transpose(0, 1) for each in (keys, values))
        head = torch.arange(heads, device=query.device).view(1, -1, 1)
        for start in range(0, count, rows):
            asked = query[start : start + rows]
            last = torch.arange(first + start, first + start + len(asked), device=query.device).view(-1, 1, 1)
            blocks = self.chosen(asked, keys, first + start)
            inside = torch.arange(self.block, device=query.device)
            places = (blocks.unsqueeze(-1) * self.block + inside).flatten(2)
            seen = places <= last
            places = places[..., : int(seen.sum(-1).max())]  # what a token reads stands in a row
            seen, places = seen[..., : places.shape[-1]], places.clamp(max=len(keys) - 1)
            # A row is a token and a KV head, with the query heads of that.
            grouped = asked.view(len(asked) * heads, 1, -1, dim)
            read = (each[head, places].flatten(0, 1).unsqueeze(2) for each in (keys_by_head, values_by_head))
            mask = seen.flatten(0, 1)[:, None, None]
            found.append(attend_rows(grouped, *read, scale=scale, mask=mask).view(asked.shape))
        return torch.cat(found)
