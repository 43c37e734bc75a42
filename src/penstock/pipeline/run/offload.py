"""Activations that wait in host memory between the forward and the backward of a microbatch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from penstock.core.devices import synchronize

#: When copies are done; None where they are done at once.
Event = torch.cuda.Event | None

#: Bytes of the copy by which a link is measured: long enough that its start does not count.
_SAMPLE = 1 << 25


class HostLink:
    """The ways between a device and its host's memory: on CUDA a stream each, so that copies run beside the work.

    The device's memory belongs to the stream of the work on both ways, which waits for a copy before it uses that
    memory for something else. So how much is held follows from the order of tasks, however far the process is ahead of
    its device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._back = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Copies in the host's memory, pinned on CUDA, and when they are made: after the work until now."""
        if self._out is None:
            return [tensor.clone() for tensor in tensors], None
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        hosts = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        return _copied(tensors, hosts, self._out)

    def fetch(self, hosts: Sequence[Tensor], sent: Event) -> tuple[list[Tensor], Event]:
        """Copies on the device, and when they are made: after the work until now."""
        if self._back is None or sent is None:
            return list(hosts), None
        tensors = [torch.empty_like(host, device=self.device) for host in hosts]
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        self._back.wait_event(sent)
        return _copied(hosts, tensors, self._back)

    def bandwidth(self) -> float:
        """Bytes a second to the host's memory, measured now: of two copies by the second, for which memory is found."""
        tensor = torch.empty(_SAMPLE, dtype=torch.uint8, device=self.device)
        return _SAMPLE / [self._seconds(tensor) for _ in range(2)][1]

    def _seconds(self, tensor: Tensor) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        _, sent = self.send([tensor])
        if sent is not None:
            sent.synchronize()
        return time.perf_counter() - began

    def wait(self, event: Event) -> None:
        """The work from now on waits for copies."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def _copied(sources: Sequence[Tensor], targets: list[Tensor], stream: torch.cuda.Stream) -> tuple[list[Tensor], Event]:
    with torch.cuda.stream(stream):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
        return targets, stream.record_event()


class _Kept:
    """A tensor that autograd has saved, wherever it is now."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Offloaded(contextlib.AbstractContextManager["Offloaded"]):
    """What autograd saves of the forward pass in its ``with`` block leaves for the host at the end of the block.

    Each tensor once, however many operations save it; weights stay, and so does the stage's input where the runtime
    holds it for its gradient. Then come, in this order: :meth:`leave` once there is other work beside the copies,
    :meth:`call_back` some work before the backward pass, and :meth:`arrive` just before it.

    Args:
        link: of the device.
        weights: what stays; other tensors of the same storage too.
    """

    def __init__(self, link: HostLink, weights: Iterable[Tensor]) -> None:
        self._link = link
        self._staying = {weight.untyped_storage().data_ptr() for weight in weights}
        self._kept: dict[tuple[object, ...], _Kept] = {}
        self._leaving: list[Tensor] = []
        self._sent: Event = None
        self._back: Event = None
        self._called = False
        self._hooks = saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def __enter__(self) -> Offloaded:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        del self._hooks  # they know this object: what it keeps would live until the next collection of cycles
        self._leaving = self._tensors()
        hosts, self._sent = self._link.send(self._leaving)
        self._move(hosts)

    def leave(self) -> None:
        """Waits, in the device's queue of work, for the copies to the host, and frees the device's memory."""
        self._link.wait(self._sent)
        self._leaving = []

    def call_back(self) -> None:
        """Starts the copies back to the device, unless they are under way."""
        if not self._called:
            self._called = True
            tensors, self._back = self._link.fetch(self._tensors(), self._sent)
            self._move(tensors)

    def arrive(self) -> None:
        """Waits, in the device's queue of work, for the copies back; starts them if need be."""
        self.call_back()
        self._link.wait(self._back)

    def _tensors(self) -> list[Tensor]:
        return [kept.tensor for kept in self._kept.values()]

    def _move(self, tensors: list[Tensor]) -> None:
        for kept, tensor in zip(self._kept.values(), tensors, strict=True):
            kept.tensor = tensor

    def _keep(self, tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage().data_ptr()
        if storage in self._staying:
            return _Kept(tensor)
        # All of them are alive until the end of the block, so that no two have the same place.
        key = storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        return self._kept.setdefault(key, _Kept(tensor.detach()))
