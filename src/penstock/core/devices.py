"""Which device to use, and what it can do."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from penstock.core.errors import UsageError
from penstock.core.processor import fast_dtype, kind

Made = TypeVar("Made")


def pick(name: str = "auto") -> torch.device:
    """The device called ``name``: ``auto`` is the first CUDA device if there is one, else the CPU.

    Raises:
        UsageError: the device is not there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device called {name!r}", hint="Use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("no CUDA device is available", hint="Use --device cpu, or --device auto.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    elif device.type != "cpu":
        raise UsageError(f"Penstock runs on cpu and cuda, not on {device.type!r}")
    return device


def label(device: torch.device) -> str:
    """A short name of the hardware for file names and tables, such as ``cpu-2-avx2`` or ``h100``."""
    if device.type == "cpu":
        return f"cpu-{torch.get_num_threads()}-{kind().lower().replace(', ', '-').replace(' ', '-')}"
    name = torch.cuda.get_device_name(device).lower()
    return next((chip for chip in ("h100", "h200", "a100", "b200") if chip in name), name.replace(" ", "-"))


def inference_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a model computes on ``device`` where nobody asks for another: on a CUDA device the one that is
    fast there, on a CPU fp32, so that answers do not depend on which kind of processor it is."""
    return fast_dtype(device).choice if device.type == "cuda" else torch.float32


def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` can generate code here: the CPU needs a C++ compiler, CUDA needs Triton."""
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401

            return True
        return False
    return any(shutil.which(c) for c in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if c)


def choose_assembler() -> None:
    """Has Triton assemble its kernels with what PyTorch brings, where it brings one. torch.compile sets that at its
    first kernel, and not where it finds all of them kept: for a process that was started later, Triton would take what
    the first has kept for another assembler's, and compile it anew."""
    assembler = Path(torch.__file__).parent / "bin" / "ptxas"
    if os.access(assembler, os.X_OK):
        os.environ.setdefault("TRITON_PTXAS_PATH", str(assembler))


def pinned(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of ``values`` on the host, from where copies to ``device`` wait for nothing: in pinned memory for CUDA."""
    given = torch.from_numpy(np.array(values, order="C"))
    return given.pin_memory() if device.type == "cuda" else given


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of ``values`` on ``device``; on CUDA it is only queued. One of many values costs the host no more time
    than one of a few does."""
    return pinned(values, device).to(device, non_blocking=True)


class DeviceMemory:
    """The memory of a CUDA ``device``, as its driver and PyTorch's allocator count it, in bytes.

    Attributes:
        total: of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total = torch.cuda.mem_get_info(device)[1]

    def free(self) -> int:
        """What nobody has, once the allocator has given back what it keeps for later."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def peak(self, run: Callable[[], object]) -> int:
        """What ``run`` takes at its peak, beside what was taken before: by the allocator, whose pieces may not fit
        exactly, and by libraries beside it."""
        before, kept = self.free(), torch.cuda.memory_reserved(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        taken = before - torch.cuda.mem_get_info(self._device)[0]
        allocator = torch.cuda.memory_reserved(self._device) - kept
        return torch.cuda.max_memory_reserved(self._device) - kept + max(taken - allocator, 0)


class CapturedTooEarlyError(RuntimeError):
    """While a graph was captured, something that lasts had to be made first."""


def lasting(make: Callable[..., Made]) -> Callable[..., Made]:
    """``make``, whose results stay on a device and are remembered, as by :func:`functools.cache`.

    Raises:
        CapturedTooEarlyError: when it is called, and has to make something while a graph is captured. What a graph
            makes is there from its first replay on, and others would read it before.
    """

    @functools.cache
    def made(*arguments: object) -> Made:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise CapturedTooEarlyError(f"{make.__qualname__} makes what lasts while a graph is captured")
        return make(*arguments)

    return made


def synchronize(device: torch.device) -> None:
    """Waits until all work queued on ``device`` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


#: Peak dense bf16 rate in FLOP/s by chip, from the makers' data sheets.
PEAK_BF16 = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """The data-sheet bf16 rate of ``device`` in FLOP/s, or None where none is known (every CPU)."""
    return PEAK_BF16.get(label(device)) if device.type == "cuda" else None
