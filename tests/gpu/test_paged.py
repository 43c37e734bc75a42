"""The law of ``attention.paged`` on a CUDA device, for every registered policy that serves it."""

from __future__ import annotations

import pytest
import torch

from penstock.ops.paged.contract import CacheShape, PagedAttention
from penstock.testing.attention_paged import Fork, Release, Scene, Step
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
