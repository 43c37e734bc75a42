"""The law of ``attention.paged`` on a CUDA device, for every registered policy that serves it."""

from __future__ import annotations

import itertools

import pytest
import torch

from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch
from penstock.testing.attention_paged import Fork, Keep, Open, Release, Scene, Step, Tree
from penstock.testing.enrolled import enrolled

pytestmark = pytest.mark.gpu

POLICIES = enrolled("attention.paged")

#: Prefills, chunks and decodes in one batch; shared blocks; blocks that are dealt out again.
SCRIPT = (
    Step(((0, 300), (1, 5), (2, 33))),
    Step(((0, 1), (1, 1), (2, 1))),
    Fork(0, 3),
    Step(((3, 1), (0, 1), (1, 100))),
    Release(2),
    Step(((4, 77), (3, 6), (1, 1))),
    Release(0),
    Step(((5, 1), (3, 1), (4, 1))),
    Step(((5, 500), (3, 1), (1, 3))),
    Step(((3, 1), (4, 40), (1, 7), (5, 63)), ((4, Open(32)), (5, Tree(tuple((n - 1) // 2 for n in range(63)))))),
    Keep(5, (0, 2, 5, 12)),
    Step(((5, 9), (4, 20)), ((5, Tree((-1, -1, 0, 1, 1, -1, 5, 2, 6))),)),
    Step(((5, 1), (3, 1), (4, 2))),
)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("windows", [(None,), (50,), (None, 50)])
@pytest.mark.parametrize(("kv_heads", "groups"), [(4, 1), (2, 4), (1, 7)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_equals_softmax_attention_over_each_sequences_own_tokens(
    name: str, windows: tuple[int | None, ...], kv_heads: int, groups: int, head_dim: int
) -> None:
    policy = POLICIES[name]
    assert isinstance(policy, PagedAttention)
    device, dtype = torch.device("cuda"), torch.bfloat16
    reason = policy.serves(device, dtype, head_dim)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    shape = CacheShape(len(windows), groups * kv_heads, kv_heads, head_dim, 100, 16, dtype, device, frozenset(windows))
    Scene(policy, shape, windows, tolerance=6e-3).play(SCRIPT)


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
