"""The law of ``attention.paged`` on a CUDA device, for every registered policy that serves it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from penstock.ops.paged.codecs.fp8 import Fp8
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch
from penstock.ops.paged.flashinfer import FlashInfer
from penstock.testing.attention_paged import LONG, Course, Place, check_course, check_place, places
from penstock.testing.enrolled import enrolled
from penstock.testing.paged_scene import Keep, Step

pytestmark = pytest.mark.gpu

POLICIES = enrolled("attention.paged")


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
