"""The multiprocessors of a CUDA device: how many there are, and how much of a kernel fits into one."""

from __future__ import annotations

import functools

import torch

#: Shared memory of a program on every device, in bytes.
LEAST = 48 << 10


@functools.cache
def processors(device: torch.device) -> int:
    """How many there are."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def stages(device: torch.device, wanted: int, size: int) -> int:
    """As many of the ``wanted`` stages of a pipeline as the shared memory of a program has room for, of ``size`` bytes
    each; one at least. Tiles are measured on devices that have more of it than others."""
    return max(1, min(wanted, _shared_memory(device) // size))


@functools.cache
def read_shared_memory(device: torch.device) -> bool:
    """Whether matrix units multiply what lies there, as from Hopper on: of a large tile, registers hold the sums and
    little else then."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    size: int = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", LEAST)
    return size
