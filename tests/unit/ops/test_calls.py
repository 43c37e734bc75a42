"""Native calls that were recorded compute the same again, and what is more than these is told."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from penstock.ops import native, rowwise
from penstock.ops.activations import swiglu
from penstock.ops.calls import LINE, NUMBERS, PIECE, Calls, Room, records
from penstock.ops.linear import linear
from penstock.ops.norms import rms_norm
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.integers import Int8

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not records(), reason="this processor has other calls"),
]

SIZE = 512


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def block(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What a layer does to each row: a norm, a product that is kept plain, a gate, a quantized product, and a sum."""
    draw = torch.Generator().manual_seed(0)
    scale, wide = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((SIZE,), (2 * SIZE, SIZE)))
    values = torch.randint(-127, 127, (SIZE, SIZE), generator=draw, dtype=torch.int8)
    packed = Packed(Int8(), {"values": values, "scale": torch.rand(SIZE, 1, generator=draw) / 1000})

    def compute(x: Tensor) -> Tensor:
        gated = swiglu(linear(rms_norm(x.view(-1, SIZE), scale, 1e-6), wide))
        return (x + packed.product(gated).to(dtype).reshape(x.shape)).flatten(0, 0)

    return compute


@pytest.mark.parametrize("count", [1, 3])
def test_calls_compute_for_other_numbers_in_the_same_memory(count):
    compute, calls, x = block(torch.float32), Calls(Room()), torch.randn(count, SIZE)
    first = calls.record(lambda: compute(x))
    assert calls.obstacle is None and calls.room.used >= first.nbytes
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        calls.again()
        assert torch.equal(first, compute(x))


def test_their_memory_is_nobody_elses():
    compute, calls, x = block(torch.float32), Calls(Room()), torch.randn(1, SIZE)
    found = calls.record(lambda: compute(x))
    others = [torch.full((1, size), 7.0) for size in (SIZE, 2 * SIZE) for _ in range(64)]
    calls.again()
    assert all((each == 7).all() for each in others)
    assert torch.equal(found, compute(x))


@pytest.mark.parametrize(
    ("compute", "obstacle"),
    [
        (lambda x: x * 2, "aten.mul"),
        (lambda x: x.mT.contiguous(), "aten.contiguous"),
        (lambda x: x.to(torch.float64), "aten.to"),
        (lambda x: x + x[:1], "aten.add"),
        (lambda x: x.clone(), "aten.clone"),
        (lambda x: x.fill_(0), "aten.fill_"),
        (lambda x: x.argmax(1), "aten.argmax"),
        (lambda x: x.sum().item(), "aten.sum"),
    ],
)
def test_what_is_no_native_call_is_told(compute, obstacle):
    calls, x = Calls(Room()), torch.randn(3, SIZE)
    calls.record(lambda: compute(x))
    assert calls.obstacle is not None and calls.obstacle.startswith(obstacle)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.to(torch.float32).contiguous(),
        lambda x: x.unflatten(-1, (8, -1)).transpose(0, 1)[2:].flatten(0, 0),
        lambda x: x.split((SIZE - 1, 1), -1)[1].view(3),
        lambda x: torch.empty_like(x).chunk(2, -1)[0],
    ],
)
def test_views_are_no_obstacle(compute):
    calls, x = Calls(Room()), torch.randn(3, SIZE)
    calls.record(lambda: compute(x))
    assert calls.obstacle is None


def test_other_threads_are_not_recorded():
    x, scale, calls = torch.randn(1, SIZE), torch.ones(SIZE), Calls(Room())

    def elsewhere() -> None:
        with torch.inference_mode():
            rowwise.rms_norm(x, scale, 1e-6)

    def compute() -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return rowwise.rms_norm(x, scale, 1e-6)

    calls.record(compute)
    assert len(calls._calls) == 1
    assert not native.keep(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_pytorch_s_own(dtype):
    a, b = (torch.randn(7, 37).to(dtype) for _ in range(2))
    a[0, :3] = torch.tensor([torch.inf, torch.nan, 3e38])
    torch.testing.assert_close(rowwise.add(a, b), a + b, rtol=0, atol=0, equal_nan=True)


def test_all_that_functions_take_fits():
    """More numbers than a call has room for are refused by ctypes, and would not be noticed otherwise."""

    class Function:
        address, real = 0, None

    calls = Calls(Room())
    calls.note(Function, tuple(range(NUMBERS)))
    with pytest.raises(IndexError):
        calls.note(Function, tuple(range(NUMBERS + 1)))


def test_computations_have_their_room_one_after_the_other():
    room, pieces = Room(), set()
    for sizes in 2 * ((3, PIECE // 4, 5), (PIECE, 7), (1,)):
        room.begin()
        made = [room.like(torch.empty(size)) for size in sizes]
        assert room.used == sum(-(-4 * size // LINE) * LINE for size in sizes)
        assert all(each.data_ptr() % LINE == 0 for each in made)
        for number, each in enumerate(made):
            each.fill_(number)
        assert all((each == number).all() for number, each in enumerate(made))
        pieces |= {each.untyped_storage().data_ptr() for each in made}
    # Of the first, three, of which none has place for what the second begins with, nor for what follows that.
    assert len(pieces) == len(room._pieces) == 5


def test_one_that_is_made_again_may_use_what_another_has_used():
    compute, room = block(torch.float32), Room()
    given = [torch.randn(count, SIZE) for count in (1, 4, 2)]
    recorded = [Calls(room) for _ in given]
    found = [calls.record(lambda x=x: compute(x)) for calls, x in zip(recorded, given, strict=True)]
    for calls, x, own in zip(recorded, given, found, strict=True):
        calls.again()
        assert torch.equal(own, compute(x))
