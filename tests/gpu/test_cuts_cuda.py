"""Cuts on CUDA: what stays is what stays on the CPU, and a draw is the CPU's."""

from __future__ import annotations

import pytest
import torch

from penstock.core.randomness import torch_generator
from penstock.ops.cuts import draw_cut, draw_uncut, floor_of
from penstock.ops.draw import Floor

pytestmark = pytest.mark.gpu

ROWS = 96


def scores(kind: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch_generator(0, "cuts", kind, size)
    normal = torch.randn(ROWS, size, generator=draw)
    ranks = torch.rand(ROWS, size, generator=draw).argsort(-1) + 1
    made = {
        "flat": 0.02 * normal,
        "broad": 3 * normal,
        "steep": -1.5 * ranks.log(),
        "ties": (2 * normal).round(),
        "equal": torch.zeros(ROWS, size),
        "forbidden": (3 * normal).masked_fill(normal > -2, -torch.inf),
    }
    return made[kind].to(dtype)


def draws() -> torch.Tensor:
    """Of each row: none of the cuts, each alone, all together, and greedy."""
    draw = torch_generator(0, "draws")
    chance = torch.rand(5, ROWS, generator=draw, dtype=torch.float64)
    temperature, top_k, top_p = 0.2 + 1.5 * chance[0], (1 + 5000 * chance[1] ** 4).floor(), 0.05 + 0.949 * chance[2]
    kinds = torch.arange(ROWS) % 6
    made = [
        temperature.masked_fill(kinds == 5, 0),
        top_k.where((kinds == 1) | (kinds == 4), 0),
        top_p.where((kinds == 2) | (kinds == 4), 1),
        (0.3 * chance[3]).where((kinds == 3) | (kinds == 4), 0),
    ]
    return torch.stack([*made, chance[4].masked_fill(kinds == 5, 0)])


def weight_kept(logits: torch.Tensor, floor: Floor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens stay, and their share of the whole probability."""
    least = floor.score.unsqueeze(-1)
    tied = logits.float() == least
    kept = (logits.float() > least) | (tied & (tied.cumsum(-1) <= floor.ties.unsqueeze(-1)))
    return kept, (logits.double() / temperature.clamp(min=0.01).unsqueeze(-1)).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [17, 4096, 151_936])
@pytest.mark.parametrize("kind", ["flat", "broad", "steep", "ties", "equal", "forbidden"])
@torch.inference_mode()
def test_what_stays_is_what_stays_on_the_cpu(kind: str, size: int, dtype: torch.dtype) -> None:
    logits, options = scores(kind, size, dtype), draws()
    logits[:, 0] = 1.0
    wanted = floor_of(logits, options[:4])
    found = floor_of(logits.cuda(), options[:4].cuda())
    assert wanted is not None and found is not None
    cut = options[0] > 0
    kept, chances = weight_kept(logits[cut], Floor(wanted.score[cut], wanted.ties[cut]), options[0][cut])
    ours, _ = weight_kept(logits[cut], Floor(found.score.cpu()[cut], found.ties.cpu()[cut]), options[0][cut])
    # A share is summed in float32 there: tokens on the very edge may fall on the other side, one of equals whole.
    edge = 1.01 / size if kind == "equal" and size > 1000 else 0
    assert ((kept != ours) * chances).sum(-1).max() < 2e-5 + edge
    by_k = cut & (options[1] > 0) & (options[2] >= 1)
    only = by_k[cut]
    assert torch.equal(kept[only & (options[3][cut] == 0)], ours[only & (options[3][cut] == 0)])


@pytest.mark.parametrize("kind", ["broad", "steep", "ties"])
@torch.inference_mode()
def test_tokens_are_those_of_the_cpu(kind: str) -> None:
    logits, options = scores(kind, 20_000, torch.float32), draws()
    wanted, found = draw_cut(logits, options), draw_cut(logits.cuda(), options.cuda()).cpu()
    # Where a number falls on the edge between two tokens, rounding may choose the other one.
    assert (wanted == found).double().mean() > 0.97
    assert torch.equal(wanted[options[0] == 0], found[options[0] == 0])


@torch.inference_mode()
def test_scores_that_are_not_numbers_end_all_the_same() -> None:
    logits = torch.full((4, 5000), torch.nan, device="cuda", dtype=torch.bfloat16)
    logits[1, 7], logits[2] = torch.inf, -torch.inf
    options = torch.tensor([[0.7] * 4, [40.0] * 4, [0.9] * 4, [0.1] * 4, [0.5] * 4], dtype=torch.float64, device="cuda")
    tokens = draw_cut(logits, options)
    assert ((tokens >= 0) & (tokens < 5000)).all()


@pytest.mark.parametrize("size", [17, 4096, 151_936])
@torch.inference_mode()
def test_where_nothing_is_cut_a_draw_is_the_same_to_the_last_bit(size: int) -> None:
    """Whether others in the batch are cut must not matter."""
    given = draws().cuda()
    given[1], given[2], given[3] = 0, 1, 0
    cut = given.clone()
    cut[2, ::2] = 0.9
    for kind in ("flat", "broad", "steep"):
        logits = scores(kind, size, torch.float32).cuda()
        found, beside = draw_uncut(logits, given), draw_cut(logits, cut)
        assert torch.equal(found, draw_cut(logits, given))
        assert torch.equal(found[1::2], beside[1::2])
