"""From the host to the device, without waiting."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy of ``values`` on ``device``; on CUDA it is only queued, from pinned memory."""
    given = torch.from_numpy(np.array(values, order="C"))
    return given.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else given
