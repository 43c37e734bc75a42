"""Memory for a pool on a GPU: all of it goes back once the pool is gone."""

from __future__ import annotations

import gc

import pytest
import torch

from penstock.core import pages

pytestmark = pytest.mark.gpu


def test_what_others_took_meanwhile_keeps_nothing_of_a_pool():
    device = torch.device("cuda")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    pool = pages.zeros((1, (1 << 30) + 300_000), torch.uint8, device)
    others = [torch.zeros((1 << 20) + 4096 * place, dtype=torch.uint8, device=device) for place in range(8)]
    assert torch.cuda.memory_reserved(device) - before > 1 << 30
    del pool
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) - before < 1 << 27
    assert len(others) == 8
