"""The law of ``attention.paged`` on a CUDA device, for every registered policy that serves it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.codecs.fp8 import Fp8
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch, StepShape
from penstock.ops.paged.flashinfer import FlashInfer
from penstock.ops.paged.invariant import Invariant, WalkedCache
from penstock.testing.attention_paged import LONG, Course, Place, check_course, check_place, places
from penstock.testing.enrolled import enrolled
from penstock.testing.paged_scene import Keep, Step

pytestmark = pytest.mark.gpu

POLICIES = enrolled("attention.paged")


@pytest.mark.timeout(900)  # kernels are compiled for every shape
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_holds(name: str) -> None:
    policy = POLICIES[name]
    assert isinstance(policy, PagedAttention)
    on_device = [place for place in places(policy) if place.device.type == "cuda"]
    if not on_device:
        pytest.skip(f"{name}: {policy.serves(torch.device('cuda'), torch.bfloat16, 64)}")
    for place in on_device:
        check_place(policy, place)


@pytest.mark.parametrize("counts", [[1, 1, 1], [70, 3], [1, 1, 90]], ids=["decodes", "prompts", "both"])
def test_planning_a_step_does_not_wait_for_the_device(counts: list[int]) -> None:
    """An engine plans a step while the device computes the one before."""
    policy = POLICIES["flashinfer"]
    device, dtype = torch.device("cuda"), torch.bfloat16
    reason = policy.serves(device, dtype, 128)
    if reason is not None:
        pytest.skip(reason)
    cache = policy.open(CacheShape(1, 8, 2, 128, 100, 16, dtype, device))
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    lengths = starts.diff() + 200
    tables = torch.arange(len(counts) * 20, dtype=torch.int32).view(len(counts), 20)
    batch = PagedBatch(starts, lengths, tables, torch.zeros(int(starts[-1]), dtype=torch.int64))
    for _ in range(3):
        cache.plan(batch)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2**31)
    busy.record()
    cache.plan(batch)
    assert not busy.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("heads", [(4, 1), (2, 4)], ids=["each its own", "shared"])
def test_blocks_in_fp8_are_read_by_the_scales_of_their_heads(heads: tuple[int, int]) -> None:
    """Prompts, chunks, decodes and forks, without masks."""
    policy, place = FlashInfer(), Place(torch.device("cuda"), torch.bfloat16, (128,))
    reason = policy.serves(*place[:2], 128)
    if reason is not None:
        pytest.skip(reason)
    script = tuple(
        dataclasses.replace(action, masks=()) if isinstance(action, Step) else action
        for action in LONG
        if not isinstance(action, Keep)
    )
    check_course(policy, place, Course(script, *heads, 128, 16, (None, 50)), Fp8())


@pytest.mark.parametrize(
    ("extras", "latent"),
    [(Extras(cap=2.0), None), (Extras(sinks=torch.linspace(-2, 9, 8)), None), (Extras(chunk=700), None), (PLAIN, 512)],
    ids=["cap", "sinks", "chunk", "latent"],
)
def test_what_flashinfer_does_not_compute_can_be_replayed_from_a_graph(extras: Extras, latent: int | None) -> None:
    """Two sequences that decode and one with five new tokens, of which one is longer than a piece, and then others, by
    one graph: the bits of plans that are not fixed."""
    device, dtype, size, pages = torch.device("cuda"), torch.bfloat16, 16, 100
    dim, kv_heads = (64, 2) if latent is None else (latent + 64, 1)
    shape = CacheShape(1, 8, kv_heads, dim, 300, size, dtype, device, latent=latent)
    fixed, free = (Invariant().open(shape) for _ in range(2))
    extras = extras._replace(sinks=None if extras.sinks is None else extras.sinks.to(device))
    step, draw = StepShape(2, 1, 5), torch.Generator().manual_seed(0)
    assert fixed.fix([step], pages)
    tokens = [torch.zeros(step.rows, heads, dim, dtype=dtype, device=device) for heads in (8, kv_heads, kv_heads)]
    given = (*tokens[:2], tokens[2][..., :latent])
    # Whatever lies there: random keys and values.
    filled = torch.randn(fixed.memory.shape, generator=draw).to(device, dtype)
    for cache in (fixed, free):
        cache.memory.copy_(filled)

    def attended(cache: WalkedCache) -> torch.Tensor:
        return cache.attend(0, *given, scale=0.1, window=None, extras=extras)

    graph, out = torch.cuda.CUDAGraph(), torch.empty(0)
    for number, lengths in enumerate(([1, 1, 5], [40, 1500, 900], [1025, 3, 1599], [16, 17, 31])):
        for each in tokens:
            each.copy_(torch.randn(each.shape, generator=draw))
        tables = torch.randperm(300, generator=draw).int().view(3, pages)
        counts = torch.tensor([1, 1, 5])
        places = torch.cat([torch.arange(end - count, end) for end, count in zip(lengths, counts, strict=True)])
        slots = tables[torch.repeat_interleave(counts), places // size].long() * size + places % size
        starts = torch.tensor([0, 1, 2, 7], dtype=torch.int32)
        batch = PagedBatch(starts, torch.tensor(lengths, dtype=torch.int32), tables, slots)
        fixed.plan(dataclasses.replace(batch, shape=step))
        if not number:
            attended(fixed)  # compiles
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                out = attended(fixed)
        graph.replay()
        free.plan(batch)
        assert torch.equal(out, attended(free))
