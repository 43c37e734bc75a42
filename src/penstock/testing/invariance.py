"""The law of batch invariance: logits after a token have the same bits however they came to be computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.models.paged import PagedTokens, cache_shape
from penstock.ops.paged.contract import PagedAttention, PagedBatch


@torch.inference_mode()
def paged_logits(
    model: Decoder,
    policy: PagedAttention,
    texts: Sequence[Sequence[int]],
    passes: Sequence[Sequence[tuple[int, int]]],
    shared: int = 0,
    block_size: int = 16,
) -> list[Tensor]:
    """Logits [length, vocabulary] after the tokens of each text.

    Args:
        passes: forward passes, each of pairs of a text and how many of its tokens are computed next.
        shared: all texts but the first begin with so many blocks of the first, and have them from it: their tokens'
            logits are not computed, and NaN.
    """
    config, weight = model.config, model.like
    widths = [-(-len(text) // block_size) for text in texts]
    cache = policy.open(cache_shape(config, block_size, weight.dtype, weight.device, blocks=sum(widths)))
    tables = torch.zeros(len(texts), max(widths), dtype=torch.int32)
    # Dealt out backwards, so that a sequence's blocks are not in the order of the memory.
    free = list(range(sum(widths)))
    for number, (table, width) in enumerate(zip(tables, widths, strict=True)):
        kept = shared if number else 0
        table[:kept] = tables[0, :kept]
        table[kept:width] = torch.tensor([free.pop() for _ in range(width - kept)], dtype=torch.int32)
    done = [shared * block_size if number else 0 for number in range(len(texts))]
    out = [torch.full((len(text), config.vocabulary), torch.nan, dtype=weight.dtype) for text in texts]
    for one in passes:
        members = torch.tensor([text for text, _ in one])
        spans = [(text, done[text], done[text] + count) for text, count in one]
        places = torch.cat([torch.arange(start, stop) for _, start, stop in spans])
        owner = members.repeat_interleave(torch.tensor([count for _, count in one]))
        starts = torch.tensor([0, *(count for _, count in one)]).cumsum(0).to(torch.int32)
        slots = tables[owner, places // block_size].long() * block_size + places % block_size
        lengths = torch.tensor([stop for _, _, stop in spans], dtype=torch.int32)
        cache.plan(PagedBatch(starts, lengths, tables[members].contiguous(), slots))
        tokens = torch.tensor([token for text, start, stop in spans for token in texts[text][start:stop]])
        context = PagedTokens(places.to(weight.device), cache)
        logits = model.logits(model(tokens.to(weight.device), context).hidden).cpu()
        for (text, start, stop), rows in zip(spans, torch.split(logits, [count for _, count in one]), strict=True):
            out[text][start:stop], done[text] = rows, stop
    return out
