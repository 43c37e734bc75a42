"""What stays on a device."""

from __future__ import annotations

import pytest
import torch

from penstock.core.devices import CapturedTooEarlyError, lasting


def test_what_lasts_is_made_once_and_in_no_graph(monkeypatch):
    made, capturing = list[int](), [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])

    @lasting
    def zeros(size: int) -> torch.Tensor:
        made.append(size)
        return torch.zeros(size)

    with pytest.raises(CapturedTooEarlyError, match="zeros makes what lasts while a graph is captured"):
        zeros(3)
    capturing[0] = False
    first = zeros(3)
    capturing[0] = True
    assert zeros(3) is first and made == [3]
