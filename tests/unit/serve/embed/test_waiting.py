"""Texts of several requests are computed together, and each request gets its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.core.errors import UsageError
from penstock.models.encoders.pooling import Pooling
from penstock.serve.embed.pooled import PooledModel
from penstock.serve.embed.waiting import WaitingTexts
from penstock.serve.messages import Embed, Vectors


class Model:
    """Its vector of a text is the sum of its tokens and their number; keeps what it computes at once."""

    def __init__(self) -> None:
        self.passes: list[list[list[int]]] = []

    def pooled(self) -> PooledModel:
        def states(flat: torch.Tensor, lengths) -> torch.Tensor:
            self.passes.append([each.tolist() for each in torch.split(flat, list(lengths))])
            return torch.stack([flat.float(), torch.ones(len(flat))], 1)

        total = Pooling(way="mean_sqrt", normalize=False)
        return PooledModel(states, 8, 100, 2, total, torch.device("cpu"), 0)


def vectors(told: list[Vectors]) -> dict[tuple[str, int], list[float]]:
    rows = [np.frombuffer(each.rows, np.float32).reshape(-1, 2).tolist() for each in told]
    return {
        (each.id, place): row
        for each, own in zip(told, rows, strict=True)
        for place, row in zip(each.places, own, strict=True)
    }


def test_each_request_gets_its_own_vectors_and_a_small_one_does_not_wait_for_a_large_one():
    model = Model()
    waiting = WaitingTexts(model.pooled(), 6)
    large, small = [[1, 2], [3], [4, 5, 6], [7, 8]], [[9]]
    waiting.add(Embed("large", large))
    waiting.add(Embed("small", small))
    found = vectors(waiting.step())
    assert ("small", 0) in found  # in the first pass
    while waiting.busy:
        found |= vectors(waiting.step())
    texts = {("large", place): text for place, text in enumerate(large)} | {("small", 0): small[0]}
    assert found.keys() == texts.keys()
    for key, text in texts.items():
        assert found[key] == pytest.approx([sum(text) / len(text) ** 0.5, len(text) ** 0.5])
    assert all(sum(map(len, each)) <= 6 for each in model.passes)
    assert (waiting.texts, waiting.tokens) == (5, 9)


def test_a_text_with_more_tokens_than_a_pass_is_computed_alone():
    model = Model()
    waiting = WaitingTexts(model.pooled(), 2)
    waiting.add(Embed("a", [[1, 2, 3], [4]]))
    waiting.step()
    assert model.passes == [[[1, 2, 3]]]


def test_what_is_not_wanted_any_more_is_not_computed():
    model = Model()
    waiting = WaitingTexts(model.pooled(), 1)
    waiting.add(Embed("a", [[1], [2]]))
    waiting.add(Embed("b", [[3]]))
    waiting.step()
    waiting.abort("a")
    waiting.abort("nobody")
    assert list(vectors(waiting.step())) == [("b", 0)]
    assert not waiting.busy
    assert waiting.step() == []


@pytest.mark.parametrize("text", [[], [1] * 9, [100], [-1]])
def test_a_request_is_refused_as_a_whole(text):
    waiting = WaitingTexts(Model().pooled(), 6)
    with pytest.raises(UsageError, match="a text has"):
        waiting.add(Embed("a", [[1], text]))
    assert not waiting.busy
