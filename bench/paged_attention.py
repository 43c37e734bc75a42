"""Decode attention over few long sequences, whose work has to be split for all units to be busy.

One new token a sequence; 32 query heads over 8 key heads of 128 on CUDA, as Qwen3-8B has them, 8 over 2 on the CPU. The
peer is scaled_dot_product_attention over the same keys and values, contiguous, a call for each sequence. On CUDA the
kernel is also measured beside itself with its splits turned off. None of it is evidence for the paper behind the CPU's
kernel (Lean Attention, 441): the peer there is another kernel, not ours without its splits, and CUDA's is FlashInfer's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.bench import Bench
from penstock.core.errors import PenstockError
from penstock.core.randomness import torch_generator
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch
from penstock.policy import create

HEAD_DIM, BLOCK, SCALE = 128, 16, 128**-0.5

#: Tokens of the sequences of a batch; where the device is a GPU, eight times as many.
BATCHES = {"1 sequence": [32768], "4 ragged sequences": [1024, 4096, 16384, 32768], "16 sequences": [2048] * 16}

#: Keys and values that are written in one step.
PIECE = 4096

Attend = Callable[[], Tensor]
Rows = list[tuple[Tensor, Tensor]]


def random_rows(lengths: list[int], shape: CacheShape) -> Rows:
    """Keys and values [K, T, D] of each sequence."""
    draw = torch_generator(0, "paged attention")
    sizes = [(shape.kv_heads, length, HEAD_DIM) for length in lengths for _ in range(2)]
    drawn = [torch.randn(size, generator=draw).to(shape.device, shape.dtype) for size in sizes]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def paged(policy: PagedAttention, shape: CacheShape, rows: Rows, query: Tensor) -> Attend:
    """``query`` [B, H, D] over the ``rows`` in a paged cache, where the blocks of all sequences lie mixed."""
    cache, lengths = policy.open(shape), [key.shape[1] for key, _ in rows]
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch_generator(0, "blocks")).to(torch.int32)
    tables = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    slots = []
    for (key, value), own, table in zip(rows, order.split(counts), tables, strict=True):
        table[: len(own)] = own
        slots.append((own.long().unsqueeze(1) * BLOCK + torch.arange(BLOCK)).flatten()[: key.shape[1]])
        pieces = key.split(PIECE, 1), value.split(PIECE, 1), slots[-1].split(PIECE), own.split(PIECE // BLOCK)
        for k, v, places, blocks in zip(*pieces, strict=True):
            # A step that writes them; what it attends to is of no interest.
            count = torch.tensor([0, len(places)], dtype=torch.int32)
            cache.plan(PagedBatch(count, count[1:], blocks.unsqueeze(0), places))
            nobody = query.new_zeros(len(places), *query.shape[1:])
            cache.attend(0, nobody, k.transpose(0, 1), v.transpose(0, 1), scale=SCALE, window=None)
    last = torch.stack([own[-1] for own in slots])
    starts = torch.arange(len(rows) + 1, dtype=torch.int32)
    cache.plan(PagedBatch(starts, torch.tensor(lengths, dtype=torch.int32), tables, last))
    key, value = (torch.stack([row[which][:, -1] for row in rows]) for which in (0, 1))
    return lambda: cache.attend(0, query, key, value, scale=SCALE, window=None)


def contiguous(rows: Rows, query: Tensor) -> Attend:
    """The same over contiguous rows, with PyTorch's attention."""

    def attend() -> Tensor:
        found = [
            F.scaled_dot_product_attention(own[None, :, None], key[None], value[None], enable_gqa=True)
            for own, (key, value) in zip(query, rows, strict=True)
        ]
        return torch.cat(found)[:, :, 0]

    return attend


def flashinfer(rows: Rows, query: Tensor, split: bool) -> Attend:
    """FlashInfer's kernel itself, with and without splitting the keys of a head."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    pages = torch.cat([torch.stack(row, 1).unflatten(2, (-1, BLOCK)).permute(2, 1, 3, 0, 4) for row in rows])
    counts = (row[0].shape[1] // BLOCK for row in rows)
    ends = torch.tensor([*itertools.accumulate(counts, initial=0)], dtype=torch.int32)
    full = torch.full((len(rows),), BLOCK, dtype=torch.int32)
    workspace = torch.zeros(2**28, dtype=torch.uint8, device=query.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        ends, torch.arange(len(pages), dtype=torch.int32, device=query.device), full, query.shape[1], pages.shape[3],
        HEAD_DIM, BLOCK, q_data_type=query.dtype, kv_data_type=query.dtype, disable_split_kv=not split,
    )  # fmt: skip
    return lambda: wrapper.run(query, pages)


@torch.inference_mode()
def main(bench: Bench) -> None:
    """Measures each batch."""
    cuda = bench.device.type == "cuda"
    calls = 20 if cuda else 3

    def microseconds(attend: Attend) -> Callable[[], float]:
        return lambda: 1e6 * bench.seconds(lambda: [attend() for _ in range(calls)]) / calls

    for name, lengths in BATCHES.items():
        lengths = [length // 32 if bench.quick else (8 * length if cuda else length) for length in lengths]
        heads, kv_heads, dtype = (32, 8, torch.bfloat16) if cuda else (8, 2, torch.float32)
        blocks = sum(lengths) // BLOCK
        shape = CacheShape(1, heads, kv_heads, HEAD_DIM, blocks, BLOCK, dtype, bench.device)
        rows, draw = random_rows(lengths, shape), torch_generator(0, "query")
        query = torch.randn(len(lengths), heads, HEAD_DIM, generator=draw).to(bench.device, dtype)
        policy = create("attention.paged", "flashinfer" if cuda else "cpu")
        subjects = {"paged": paged(policy, shape, rows, query), "peer": contiguous(rows, query)}
        ours, theirs = (subjects[which]().float() for which in ("paged", "peer"))
        error = float((ours - theirs).norm() / theirs.norm())
        if error > 0.02:
            raise PenstockError(f"the two do not agree: a relative difference of {error:.3f} over {name}")
        setting = f"{name}, {sum(lengths):,} tokens, {heads} heads over {kv_heads}"
        common = {"metric": "time of a step's attention", "unit": "us", "better": "lower", "repetitions": 7}
        bench.compare(
            subject=policy.policy_name,
            peer="scaled_dot_product_attention, contiguous",
            setting=setting,
            run=microseconds(subjects["paged"]),
            peer_run=microseconds(subjects["peer"]),
            **common,
        )
        if cuda:
            bench.compare(
                subject="flashinfer, keys split",
                peer="flashinfer, not split",
                setting=setting,
                run=microseconds(flashinfer(rows, query, split=True)),
                peer_run=microseconds(flashinfer(rows, query, split=False)),
                **common,
            )
