"""What each router promises beyond the law."""

from __future__ import annotations

import torch

from penstock.models.routers.sigmoid import SigmoidRouter
from penstock.models.routers.softmax import SoftmaxRouter


def test_weights_sum_as_their_routers_say() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 3.0, 0.0, 0.0]], dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(SoftmaxRouter().route(logits).weights.sum(1), one)
    torch.testing.assert_close(SoftmaxRouter(scale=2.5).route(logits).weights.sum(1), 2.5 * one)
    torch.testing.assert_close(SigmoidRouter(scale=2.5).route(logits).weights.sum(1), 2.5 * one)
    plain = SoftmaxRouter(top_k=2, normalize=False).route(logits).weights
    scaled = SoftmaxRouter(top_k=2, normalize=False, scale=2.5).route(logits).weights
    torch.testing.assert_close(scaled, 2.5 * plain)
    torch.testing.assert_close(plain, logits.softmax(1).sort(1, descending=True).values[:, :2])
