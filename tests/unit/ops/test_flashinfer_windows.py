"""Windows in full precision as FlashInfer's kernels are told of them, with a stand-in for these that computes attention
over pages by its definition."""

from __future__ import annotations

import dataclasses
import math
import sys
from types import ModuleType

import torch

from penstock.ops.paged.codecs.int8 import Int8
from penstock.ops.paged.contract import PagedAttention, PagedCache
from penstock.ops.paged.flashinfer_windows import WindowedAttention
from penstock.ops.paged.residual import Rings
from penstock.testing.paged_pieces import check_windows, shape_in


class Wrapper:
    """That of a prefill over pages."""

    def __init__(self, workspace, layout, backend):
        assert layout == "NHD"

    def plan(self, starts, ends, pages, last, *, page_size, causal, num_kv_heads, **_):
        assert (last >= 1).all() and (last <= page_size).all() and len(pages) == ends[-1]
        self._given = starts.tolist(), ends.tolist(), pages.long(), last.tolist(), page_size, causal, num_kv_heads

    def run(self, query, memory, return_lse):
        starts, ends, pages, last, size, causal, heads = self._given
        keys, values = memory if isinstance(memory, tuple) else memory.unbind(1)
        assert keys.shape[1] == size and starts[-1] == len(query) and return_lse
        found, sums = [], []
        for each in range(len(last)):
            own = pages[ends[each] : ends[each + 1]]
            count = (len(own) - 1) * size + last[each]
            k, v = (x[own].flatten(0, 1)[:count].repeat_interleave(query.shape[1] // heads, 1) for x in (keys, values))
            q = query[starts[each] : starts[each + 1]]
            scores = torch.einsum("qhd,khd->qhk", q, k) * q.shape[-1] ** -0.5
            if causal:
                scores = scores.masked_fill(
                    torch.ones(len(q), count).triu(1 + count - len(q)).bool().unsqueeze(1), -math.inf
                )
            found.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), v))
            sums.append(scores.logsumexp(-1) / math.log(2))
        return torch.cat(found), torch.cat(sums)


def merge_state(one, sums, other, others):
    shares = torch.stack([sums, others]).mul(math.log(2)).softmax(0).unsqueeze(-1)
    return shares[0] * one + shares[1] * other, torch.logaddexp2(sums, others)


class Stood(PagedCache):
    """Blocks that hold what comes back of a codec, beside windows."""

    def allocate(self):
        shape = self.shape
        self._rings = Rings(shape)
        self._blocks = torch.zeros(shape.layers, shape.blocks, 2, shape.block_size, shape.kv_heads, shape.head_dim)
        self._attention = WindowedAttention(shape, torch.zeros(1), torch.float32)

    def plan(self, batch, lane=0):
        self._batch = batch
        self._rings.plan(batch)
        self._attention.plan(batch)

    def attend(self, layer, query, key, value, *, scale, window, extras=None):
        block, place = self._batch.slots // self.shape.block_size, self._batch.slots % self.shape.block_size
        codec, query = self.shape.codec, query * scale * self.shape.head_dim**0.5
        for part, vectors in enumerate((key, value)):
            back = codec.decode(codec.encode(vectors), self.shape.head_dim, torch.float32)
            self._blocks[layer, block, part, place] = back * (1 if part == 0 else 0.5)
        scales = torch.full((self.shape.heads, 1), 2.0)
        return self._attention.attend(layer, query, query, key, value, self._blocks[layer], self._rings, scales)


class Standing(PagedAttention):
    policy_name, contract_name, open = "standing", "attention.paged", staticmethod(Stood)


def test_windows_and_blocks_are_put_together(monkeypatch):
    flashinfer = ModuleType("flashinfer")
    flashinfer.BatchPrefillWithPagedKVCacheWrapper, flashinfer.merge_state = Wrapper, merge_state
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    shape = shape_in(torch.float32, torch.device("cpu"), 2, 16, Int8())
    check_windows(Standing(), dataclasses.replace(shape, windows=frozenset({None})), (None, None), 1e-6)
