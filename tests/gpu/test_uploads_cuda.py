"""Weights on their way to a GPU: buffers are used again only when what they held has arrived."""

from __future__ import annotations

import pytest
import torch

from penstock.models import hub
from penstock.models.hub.uploads import ROOM, uploads

pytestmark = pytest.mark.gpu


def test_what_arrives_is_what_was_sent() -> None:
    """Far more than all buffers hold, in pieces of all sizes, of other kinds, to places that are turned."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(ROOM // 4096 + 3, 2048), (7, 5), (ROOM // 1024, 512), (300,), (), (3, ROOM // 4)] * 6
    given = [torch.randint(-99, 99, shape, generator=draw).float() for shape in shapes]
    there = [torch.empty(each.shape, device="cuda", dtype=torch.bfloat16) for each in given]
    turned = torch.empty(2048, 4096, device="cuda")
    matrix = torch.randn(4096, 2048, generator=draw)
    with uploads(torch.device("cuda")) as copy:
        copy(turned.mT, matrix)
        for to, tensor in zip(there, given, strict=True):
            copy(to, tensor)
    assert torch.equal(turned.mT.cpu(), matrix)
    assert all(torch.equal(to.cpu().float(), tensor) for to, tensor in zip(there, given, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_read_as_on_a_cpu(dtype: torch.dtype) -> None:
    here, there = (hub.load("python-6m", device=device, dtype=dtype).state_dict() for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    assert all(torch.equal(there[name].cpu(), tensor) for name, tensor in here.items())
