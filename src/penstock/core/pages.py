"""Memory of the host that is taken page by page, when it is written to."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.core.errors import PenstockError


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of ``shape`` on ``device``. In the host's memory, they begin at a page, and the system gives each page when
    it is first written to, where :func:`torch.zeros` writes all of them at once: a pool costs time and memory for what
    it held, and not for the room that it has.

    Raises:
        PenstockError: the system does not promise that much.
    """
    count = math.prod(shape)
    if device.type != "cpu" or not count:
        return torch.zeros(*shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise PenstockError(
            f"the system has no {count * dtype.itemsize / 2**30:.1f} GiB of memory to give: {error}",
            hint="Free memory, or set engine.cache_tokens to fewer.",
        ) from error
    return torch.frombuffer(pages, dtype=dtype, count=count).view(*shape)
