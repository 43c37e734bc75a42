"""Weights on their way from files into a device's memory.

A tensor of a file is read when its bytes are asked for, page by page, by whoever copies it; one thread that does it,
and waits for the device in between, is far slower than either. Here several threads copy pieces into memory that the
device can read by itself, while what they have copied before is on its way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

#: Threads that read, bytes that each copies at a time, and bytes that may be on their way: some tensors are computed
#: when they are read.
THREADS, ROOM, MOST = 8, 32 << 20, 1 << 30

#: Copies the second tensor into the first, now or soon.
Copy = Callable[[Tensor, Tensor], object]


@contextlib.contextmanager
def uploads(device: torch.device) -> Iterator[Copy]:
    """What copies tensors of the host into views on ``device``: once the context ends, all are there."""
    if device.type == "cuda":
        with _Staged(device).running() as copy:
            yield copy
    else:
        yield lambda to, tensor: to.copy_(tensor)


class _Staged:
    """Copies by several threads. On a ``device`` that is a CPU, which needs none of it, no memory is pinned and nothing
    waited for; all else is the same."""

    def __init__(self, device: torch.device) -> None:
        self._pins = device.type == "cuda"
        # Threads have a current device of their own, which is not the caller's.
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if self._pins and device.index is None else device
        )
        self._own = threading.local()
        self._changed, self._underway = threading.Condition(), 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Copy]:
        """The copying, until all is copied. What goes wrong in a thread is raised here."""
        begun: list[Future[None]] = []

        def copy(to: Tensor, tensor: Tensor) -> None:
            with self._changed:
                self._changed.wait_for(lambda: not self._underway or self._underway + tensor.nbytes <= MOST)
                self._underway += tensor.nbytes
            begun.append(pool.submit(self._copied, to, tensor))

        with ThreadPoolExecutor(THREADS, "penstock-upload", self._enter) as pool:
            yield copy
        for each in begun:
            each.result()
        if self._pins:
            torch.cuda.synchronize(self._device)

    def _enter(self) -> None:
        """What a thread begins with."""
        if self._pins:
            torch.cuda.set_device(self._device)
            self._own.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._own.buffer = torch.empty(ROOM, dtype=torch.uint8, pin_memory=self._pins)

    @torch.no_grad()
    def _copied(self, to: Tensor, tensor: Tensor) -> None:
        try:
            # Rows of any shape, of which as many as there is room for go together.
            rows = max(1, ROOM // max(1, tensor[:1].nbytes)) if tensor.dim() else 1
            for own, piece in zip(_split(to, rows), _split(tensor, rows), strict=True):
                if piece.nbytes > ROOM or piece.device.type != "cpu":  # a row by itself, or computed on the device
                    own.copy_(piece)
                else:
                    self._send(own, piece)
        finally:
            with self._changed:
                self._underway -= tensor.nbytes
                self._changed.notify()

    def _send(self, to: Tensor, piece: Tensor) -> None:
        if self._pins:
            self._own.sent.synchronize()  # what was in the buffer before is where it belongs
        held = self._own.buffer[: piece.nbytes]
        # By NumPy, which copies in this thread alone: PyTorch's threads would be as many again for each.
        held.numpy()[:] = piece.contiguous().flatten().view(torch.uint8).numpy()
        to.copy_(held.view(piece.dtype).view(piece.shape), non_blocking=self._pins)
        if self._pins:
            self._own.sent.record()


def _split(tensor: Tensor, rows: int) -> tuple[Tensor, ...]:
    """So many ``rows`` of the tensor at a time; a number is a row."""
    return torch.split(tensor, rows) if tensor.dim() else (tensor,)
