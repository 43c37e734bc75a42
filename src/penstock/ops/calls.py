"""Native calls that are recorded, and made again without Python between them.

What PyTorch and Python do between the native calls of a pass takes as long as these themselves where a step has one
token of a small model. The calls do not change from step to step: which functions, in which order, with which addresses
and sizes; what does change lies in memory. So they are noted once, as CUDA notes the kernels of a graph, in memory of
their own.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.ops import invariant, native, rowwise
from penstock.ops.linear import FEW_ON_CPUS

SOURCE = Path(__file__).with_suffix(".cpp")

#: Whole numbers that a recorded function takes at most.
NUMBERS = 13

#: Processors whose functions can be called as :file:`calls.cpp` does.
PROCESSORS = ("x86_64", "aarch64")

#: Operators that give new memory; that give other views of what is there; and that give these, or copies.
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
VIEWS = (
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "expand", "mT", "permute", "select"),
    *("slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
)
PERHAPS_VIEWS = ("contiguous", "flatten", "reshape", "to")

#: Bytes of a piece of a :class:`Room`, and what all that lies in it begins at a multiple of.
PIECE, LINE = 1 << 20, 64

Found = TypeVar("Found")


class _Call(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("numbers", ctypes.c_int64 * NUMBERS), ("real", ctypes.c_double))


class Room:
    """Memory for computations that are made one after the other: each has all of it, from its beginning on.

    Attributes:
        used: bytes that the last one has taken.
    """

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self.begin()

    def begin(self) -> None:
        """A computation begins."""
        self.used, self._piece, self._place = 0, 0, 0

    def like(self, tensor: Tensor) -> Tensor:
        """Memory for a contiguous ``tensor``."""
        size = -(-tensor.nbytes // LINE) * LINE
        while self._piece < len(self._pieces) and self._place + size > len(self._pieces[self._piece]):
            self._piece, self._place = self._piece + 1, 0
        if self._piece == len(self._pieces):
            self._pieces.append(torch.empty(max(PIECE, size), dtype=torch.uint8))
        own = self._pieces[self._piece][self._place :][: tensor.nbytes]
        self._place, self.used = self._place + size, self.used + size
        return own.view(tensor.dtype).view(tensor.shape)


class Calls:
    """The native calls of a computation.

    Args:
        room: for what it makes.

    Attributes:
        obstacle: why they are not all that it computes; None if they are.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.obstacle: str | None = None
        self._calls: list[_Call] = []
        self._kept: list[object] = []
        self._array: Any = None

    def record(self, compute: Callable[[], Found]) -> Found:
        """What ``compute`` gives, whose calls are kept from now on. Sums of two tensors, and products with plain
        matrices, become native calls; of all else that PyTorch computes, the first is the :attr:`obstacle`."""
        self.room.begin()
        with _Watched(self), native.recording(self):
            found = compute()
        self._array = (_Call * len(self._calls))(*self._calls)
        return found

    def again(self) -> None:
        """Makes the calls."""
        _caller()(self._array, len(self._array))

    def note(self, function: native.Function, arguments: tuple[Any, ...]) -> None:
        """A call of ``function``."""
        given = [0 if each is None else each for each in arguments]
        real = 0.0 if function.real is None else given.pop(function.real)
        self._calls.append(_Call(function.address, (ctypes.c_int64 * NUMBERS)(*given), real))

    def keep(self, *objects: object) -> None:
        """What calls are given the addresses of."""
        self._kept += objects


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what PyTorch does while ``calls`` are recorded."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        named = named or {}
        instead = self._instead(function, given, named)
        if instead is not None:
            with self:
                return instead(*given)
        found = function(*given, **named)
        if function in _operators(EMPTY) and found.is_contiguous() and found.numel():
            return self._calls.room.like(found)
        views = function in _operators(VIEWS) or (function in _operators(PERHAPS_VIEWS) and _same(found, given[0]))
        if not views and self._calls.obstacle is None:
            self._calls.obstacle = str(function)
        return found

    def _instead(self, function: Any, given: Any, named: Any) -> Callable[..., Tensor] | None:
        """What makes native calls and computes the same as ``function``."""
        if function is torch.ops.penstock.invariant_linear.default:
            return invariant.linear_on_cpu
        if function is torch.ops.penstock.invariant_norm.default:
            return invariant.norm_on_cpu
        if function is torch.ops.aten.linear.default and _plain(*given):
            return invariant.invariant_linear
        if function is torch.ops.aten.add.Tensor and not named and _alike(*given):
            return rowwise.add
        return None


def records() -> bool:
    """Whether calls can be recorded on this machine."""
    return platform.machine() in PROCESSORS and native.serves(SOURCE)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the product is a native call: not where libraries are far faster."""
    alike = all(each is None or each.dtype == x.dtype for each in (weight, bias))
    few = x.numel() <= FEW_ON_CPUS.get(x.dtype, 0) * x.shape[-1]
    return alike and few and weight.is_contiguous() and rowwise.serves(x) and native.serves(invariant.SOURCE)


def _alike(a: object, b: object) -> bool:
    """Whether the sum of ``a`` and ``b`` is a native call."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous() and rowwise.serves(a)


@functools.cache
def _operators(names: tuple[str, ...]) -> frozenset[Any]:
    """PyTorch's own operators of these names, for whatever they are given."""
    packets = [getattr(torch.ops.aten, name) for name in names]
    return frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())


def _same(found: Tensor, given: Tensor) -> bool:
    """Whether both are in the same memory."""
    return found.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


@functools.cache
def _caller() -> Callable[..., None]:
    function = native.load(SOURCE).call
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], None
    called: Callable[..., Any] = function
    return called
