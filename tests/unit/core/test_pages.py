"""Memory that is taken page by page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from penstock.core import pages
from penstock.core.errors import PenstockError

CPU = torch.device("cpu")


def resident() -> int:
    """Bytes of this process that are in memory, as the system counts them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_they_are_zeros_that_can_be_written_to():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.uint8):
        made = pages.zeros((3, 5, 7), dtype, CPU)
        assert torch.equal(made, torch.zeros(3, 5, 7, dtype=dtype))
        made[1, 2] = 3
        assert made.double().sum() == 21
        assert made.data_ptr() % 4096 == 0
    assert pages.zeros((0, 4), torch.float32, CPU).shape == (0, 4)


def test_on_another_device_they_are_whole_segments():
    for count in (1, pages.SEGMENT // 2, pages.SEGMENT // 2 + 1):
        made = pages.zeros((1, count), torch.bfloat16, torch.device("meta"))
        assert made.shape == (1, count) and made.is_contiguous()
        taken = made.untyped_storage().nbytes()
        assert taken % pages.SEGMENT == 0 and made.nbytes <= taken < made.nbytes + pages.SEGMENT


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
def test_memory_is_taken_for_what_is_written_and_given_back_with_the_last_view():
    before, size = resident(), 1 << 28
    made = pages.zeros((size,), torch.uint8, CPU)
    assert resident() - before < size / 8
    kept = made[: size // 2]
    kept.fill_(1)
    assert size / 2 <= resident() - before < 3 * size / 4
    del made
    assert int(kept[-1]) == 1
    del kept
    assert resident() - before < size / 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has other processes")
def test_what_a_forked_process_writes_is_its_own():
    pool = pages.zeros((4096,), torch.uint8, CPU).numpy()
    child = os.fork()
    if not child:
        pool[:] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert not pool.any()


def test_what_the_system_does_not_have_is_said():
    with pytest.raises(PenstockError, match=r"the system has no .* of memory to give"):
        pages.zeros((1 << 60,), torch.float32, CPU)
