"""Memory for a pool: the host's, taken page by page when it is written to, or a device's, in pieces of its own."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.core.errors import PenstockError

#: PyTorch's allocator asks a CUDA device for whole numbers of so many bytes, and gives what it has left over to others.
SEGMENT = 2 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of ``shape`` on ``device``. In the host's memory, they begin at a page, and the system gives each page when
    it is first written to, where :func:`torch.zeros` writes all of them at once: a pool costs time and memory for what
    it held, and not for the room that it has. On another device, nobody else gets a part of what the allocator took for
    them: it could not give that back for as long.

    Raises:
        PenstockError: the system does not promise that much.
    """
    count = math.prod(shape)
    if device.type != "cpu" or not count:
        whole = -(-count * dtype.itemsize // SEGMENT) * SEGMENT
        return torch.zeros(whole // dtype.itemsize, dtype=dtype, device=device)[:count].view(*shape)
    try:
        pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise PenstockError(
            f"the system has no {count * dtype.itemsize / 2**30:.1f} GiB of memory to give: {error}",
            hint="Free memory, or set engine.cache_tokens to fewer.",
        ) from error
    return torch.frombuffer(pages, dtype=dtype, count=count).view(*shape)
