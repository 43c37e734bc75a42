"""Scores by a few rows at a time."""

from __future__ import annotations

import pytest
import torch

from penstock.ops import pieces as cutting
from penstock.ops.cuts import draw_cut, draw_uncut
from penstock.ops.logprobs import logprob_table
from penstock.ops.pieces import pieces


@pytest.mark.parametrize(("rows", "size", "piece"), [(7, 5, 10), (6, 5, 10), (3, 8, 4), (0, 5, 10), (2, 5, 100)])
def test_rows_come_once_in_order_and_with_what_is_beside_them(rows, size, piece, monkeypatch):
    monkeypatch.setattr(cutting, "PIECE", piece)
    scores, numbers = torch.randn(rows, size), torch.arange(rows)
    found = list(pieces(scores, numbers))
    assert all(len(own) == len(beside) <= max(1, piece // size) for own, beside in found)
    assert torch.equal(torch.cat([own for own, _ in found]), scores)
    assert torch.equal(torch.cat([beside for _, beside in found]), numbers)


def test_what_is_worked_out_by_pieces_is_what_the_whole_gives(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(9, 64, generator=generator)
    tokens = torch.randint(64, (9,), generator=generator)
    draws = torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0]], dtype=torch.float64).repeat(1, 9)
    draws[4] = torch.rand(9, generator=generator, dtype=torch.float64)
    cut = draws.clone()
    cut[1], cut[2] = 12, 0.9
    spread = torch.arange(9) % 2 == 0

    def all_of_it() -> list[torch.Tensor]:
        return [
            logprob_table(scores, tokens, 2, spread),
            logprob_table(scores, tokens, 0),
            draw_uncut(scores, draws),
            draw_cut(scores, cut),
        ]

    whole = all_of_it()
    monkeypatch.setattr(cutting, "PIECE", 2 * 64)
    for one, other in zip(whole, all_of_it(), strict=True):
        assert torch.equal(one, other)
