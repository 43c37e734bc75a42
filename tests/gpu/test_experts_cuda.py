"""The kernels of a mixture of experts, against the same arithmetic in float64."""

from __future__ import annotations

import pytest
import torch

from penstock.ops.experts import by_expert, mixed_experts, top_few

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("tokens", "few", "experts"), [(1, 8, 128), (3, 2, 8), (300, 8, 128), (5000, 4, 60)])
@torch.inference_mode()
def test_experts_are_chosen_and_ordered(tokens: int, few: int, experts: int) -> None:
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens)).cuda()
    values, places = top_few(scores, few)
    found = scores.topk(few, -1)
    assert torch.equal(values, found.values) and torch.equal(places, found.indices)
    ordered, wanted = by_expert(places, experts), by_expert(places.cpu(), experts)
    assert [each.tolist() for each in ordered] == [each.tolist() for each in wanted]


@torch.inference_mode()
def test_scores_that_are_not_numbers_give_experts_all_the_same() -> None:
    scores = torch.full((3, 60), torch.nan, device="cuda")
    scores[1], scores[2, 5] = -torch.inf, 1.0
    _, places = top_few(scores, 8)
    assert all(len(set(row)) == 8 and max(row) < 60 for row in places.tolist())


@pytest.mark.parametrize("tokens", [1, 7, 64, 120, 500, 700, 1500, 3000, 9000])
@pytest.mark.parametrize(("hidden", "ffn", "experts", "few"), [(512, 192, 32, 4), (200, 72, 6, 2)])
@torch.inference_mode()
def test_experts_add_up(tokens: int, hidden: int, ffn: int, experts: int, few: int) -> None:
    draw = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to("cuda", torch.bfloat16)

    x, gate_up, down = normal(tokens, hidden), normal(experts, 2 * ffn, hidden) / 16, normal(experts, hidden, ffn) / 8
    # Uneven: most tokens want the same few experts, and the last expert gets none.
    scores = normal(tokens, experts).float() + torch.linspace(3, 0, experts, device="cuda")
    scores[:, -1] = -torch.inf
    values, chosen = top_few(scores, few)
    got = mixed_experts(x, chosen, values.softmax(-1), gate_up, down)
    wanted = mixed_experts(*(each.double() if each.is_floating_point() else each
                             for each in (x, chosen, values.softmax(-1), gate_up, down)))  # fmt: skip
    torch.testing.assert_close(got.double(), wanted, rtol=2**-6, atol=0.01 * float(wanted.abs().max()))
    assert torch.equal(got, mixed_experts(x, chosen, values.softmax(-1), gate_up, down))
