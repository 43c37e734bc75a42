"""Copies of weights by several threads, which on a CPU pin no memory: all is there in the end, whatever its shape."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from penstock.models.hub import uploads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "ROOM", 1 << 10)


def given() -> list[tuple[Tensor, Tensor]]:
    """Where to, and what: matrices in one piece and in several, rows that are wider than a piece, a vector, a number,
    nothing, rows that do not lie together, places that are turned, and numbers of other kinds."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    bits = torch.arange(512).to(torch.uint8).view(4, 128).view(torch.float8_e4m3fn)
    pairs = [(torch.empty(shape), random(*shape)) for shape in ((3, 5), (100, 7), (4, 1000), (700,), (), (0, 4))]
    pairs.append((torch.empty(60, 8), random(60, 16)[:, ::2]))
    pairs.append((torch.empty(8, 60).mT, random(60, 8)))
    pairs.append((torch.empty(2, 40, 8)[1], random(40, 8)))
    pairs.append((torch.empty(50, 8, dtype=torch.bfloat16), random(50, 8)))
    pairs.append((torch.empty(50, 8), random(50, 8).bfloat16()))
    pairs.append((torch.empty(4, 128, dtype=torch.bfloat16), bits))
    return pairs


def test_everything_is_there_in_the_end() -> None:
    pairs = given() * 3
    with uploads._Staged(CPU).running() as copy:
        for to, tensor in pairs:
            copy(to, tensor)
    for to, tensor in pairs:
        torch.testing.assert_close(to, torch.empty_like(to).copy_(tensor), rtol=0, atol=0, equal_nan=True)


def test_a_cpu_copies_at_once() -> None:
    to, tensor = torch.zeros(2, 3), torch.ones(2, 3)
    with uploads.uploads(CPU) as copy:
        copy(to, tensor)
        assert torch.equal(to, tensor)


def test_what_goes_wrong_in_a_thread_is_raised() -> None:
    with pytest.raises(RuntimeError), uploads._Staged(CPU).running() as copy:
        for _ in range(40):
            copy(torch.empty(3, 5), torch.ones(3, 4))


def test_what_goes_wrong_while_tensors_are_read_is_raised_too() -> None:
    to = torch.zeros(3)
    with pytest.raises(ValueError, match="no such"), uploads._Staged(CPU).running() as copy:
        copy(to, torch.ones(3))
        raise ValueError("no such weight")
    assert to.all()


def test_tensors_wait_where_too_much_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than there may be, or one that is larger alone."""
    monkeypatch.setattr(uploads, "MOST", 4000)
    staged, most, lock = uploads._Staged(CPU), 0, threading.Lock()
    send = staged._send

    def noting(to: Tensor, piece: Tensor) -> None:
        nonlocal most
        with lock:
            most = max(most, staged._underway)
        send(to, piece)

    monkeypatch.setattr(staged, "_send", noting)
    with staged.running() as copy:
        for number in range(50):
            copy(torch.empty(20, 10), torch.full((20, 10), float(number)))  # 800 bytes
    assert 800 < most <= 4000
    with staged.running() as copy:
        copy(torch.empty(60, 100), torch.ones(60, 100))
    assert most == 24_000
