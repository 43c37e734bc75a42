"""Kernels for a mixture of experts, beside the operators in float64; also without a GPU, by Triton's interpreter
(``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import pytest
import torch

from interpreted import DEVICE, repaired, runs
from penstock.ops.experts import by_expert, mixed_experts

experts_kernel = pytest.importorskip("penstock.ops.experts_kernel")
from penstock.ops.invariant_kernel import Tile  # noqa: E402

pytestmark = runs
__all__ = ["repaired"]


@pytest.mark.parametrize("piece", [64, experts_kernel.PIECE])
def test_assignments_are_ordered_by_expert(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in several, of which the last is shorter."""
    monkeypatch.setattr(experts_kernel, "PIECE", piece)
    experts = torch.randint(7, (150, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    experts[experts == 3] = 4
    found, wanted = experts_kernel.ordered(experts, 7), by_expert(experts.cpu(), 7)
    assert [each.tolist() for each in found] == [each.tolist() for each in wanted]


@pytest.mark.parametrize(("count", "few", "hidden"), [(1, 8, 2048), (3, 2, 1500), (5, 1, 40)])
def test_sums_are_in_order_and_rounded_once(count: int, few: int, hidden: int) -> None:
    each = torch.randn(count, few, hidden, generator=torch.Generator().manual_seed(few)).to(DEVICE, torch.bfloat16)
    total = torch.zeros(count, hidden, device=DEVICE)
    for place in range(few):
        total += each[:, place].float()
    assert torch.equal(experts_kernel.summed(each), total.bfloat16())


@pytest.mark.parametrize(("count", "few", "hidden"), [(1, 8, 2048), (3, 2, 1500), (5, 1, 40), (0, 2, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_experts_are_added_up_with_their_shares(count: int, few: int, hidden: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(few)
    found = torch.randn(count * few, hidden, generator=draw).to(DEVICE, dtype)
    shares, back = torch.rand(count, few, generator=draw).to(DEVICE), torch.randperm(count * few, generator=draw)
    got = experts_kernel.gathered(found, back.to(DEVICE, torch.int32), shares)
    total = torch.zeros(count, hidden, device=DEVICE)
    for place in range(few):
        rows = found[back.view(count, few)[:, place].to(DEVICE)]
        total += (rows.float() * shares[:, place, None].to(dtype).float()).to(dtype).float()
    torch.testing.assert_close(got, total.to(dtype))


def test_experts_of_uneven_use_add_up() -> None:
    """Rows, columns and sums that fill no tile, and an expert that nobody chose."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE, torch.bfloat16)

    x, gate_up, down = normal(21, 72), normal(5, 2 * 40, 72) / 8, normal(5, 72, 40) / 6
    experts = (torch.rand(21, 5, generator=draw) + torch.tensor([1, 0.5, 0, 0, -2])).topk(2, -1).indices.to(DEVICE)
    shares = normal(21, 2).softmax(-1)
    tile = Tile(16, 32, 32, 4, 2)
    found = experts_kernel.summed(experts_kernel.multiply(x, experts, shares, gate_up, down, tile, tile))
    wanted = mixed_experts(x.double(), experts, shares.double(), gate_up.double(), down.double())
    torch.testing.assert_close(found.double(), wanted, rtol=2**-6, atol=0.01 * float(wanted.abs().max()))
