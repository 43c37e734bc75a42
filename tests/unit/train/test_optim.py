"""What the optimizers promise beyond their contract's law."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.testing.optim_optimizer import parameters, run
from penstock.train.optim.adamw import AdamW
from penstock.train.optim.muon import Muon, orthogonalize


def moe_decoder() -> Decoder:
    moe = MoEConfig(experts=2, ffn=6)
    shape = DecoderConfig(
        vocabulary=11, hidden=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn=6, qk_norm=True, moe=moe
    )
    return Decoder(shape).initialize(0)


def test_only_matrices_decay():
    """With gradients of zero, AdamW multiplies matrices by 1 - lr * weight_decay at each update, and moves no norm."""
    model = moe_decoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(dict(model.named_parameters()))
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] if name.endswith("norm.weight") else before[name] * 0.95**2
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def test_adamw_weights_are_an_exponential_average_of_its_updates():
    """w_t = sum_i lr wd (1 - lr wd)^(t - i) (-u_i / wd) + (1 - lr wd)^t w_0, with Adam's moments written out."""
    rate, decay, (b1, b2), eps = 0.01, 0.3, (0.9, 0.95), 1e-8
    weights = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3))
    initial, updates = weights.detach().clone(), []
    optimizer = AdamW(lr=rate, weight_decay=decay, betas=(b1, b2), eps=eps).build({"layers.0.weight": weights})
    gradients = torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for count in range(1, 41):
        weights.grad = gradients[count - 1].clone()
        optimizer.step()
        powers = torch.arange(count - 1, -1, -1, dtype=torch.float64).view(-1, 1, 1)
        mean = (b1**powers * gradients[:count]).sum(0) / (b1**powers).sum()
        square = (b2**powers * gradients[:count] ** 2).sum(0) / (b2**powers).sum()
        updates.append(mean / (square.sqrt() + eps))
    keep = 1 - rate * decay
    expected = keep**40 * initial
    for i, update in enumerate(updates, 1):
        expected = expected + rate * decay * keep ** (40 - i) * (-update / decay)
    torch.testing.assert_close(weights.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 16, 48), (2, 48, 16)])
def test_orthogonalize_moves_singular_values_near_one(shape: tuple[int, int, int]):
    """And keeps the singular vectors: U V^T of the matrix itself is close by."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    near = orthogonalize(matrices, iterations=5).double()
    u, spectrum, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    assert spectrum.max() / spectrum.min() > 1.5
    values = torch.linalg.svdvals(near)
    assert values.min() > 0.6
    assert values.max() < 1.3
    along = u.mT @ near @ vt.mT
    assert (along - torch.diag_embed(along.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.1


def test_muon_takes_the_layers_matrices_and_adam_the_rest():
    model = moe_decoder()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = Muon(lr=0.02, adam_lr=0.005, adam_weight_decay=0.1).build(dict(model.named_parameters()))
    matrices, decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.005, 0.005]
    assert matrices == {
        "layers.0.attention.qkv.weight",
        "layers.0.attention.output.weight",
        "layers.0.mlp.router.weight",
        "layers.0.mlp.gate_up",
        "layers.0.mlp.down",
    }
    assert decayed == {"embedding.weight", "head.weight"}
    assert plain == {name for name in names.values() if name.endswith("norm.weight")}


def test_muon_updates_are_as_large_as_adams():
    """A matrix's first update has entries of about 0.2 lr in the root mean square, whatever its shape (Liu et al.)."""
    shapes = {"layers.0.a": (64, 64), "layers.0.b": (16, 64), "layers.0.c": (2, 64, 32)}
    own, before = parameters(shapes), parameters(shapes)
    run([Muon(lr=0.01, weight_decay=0.0).build(own)], own, 1)
    for name, parameter in own.items():
        moved = (parameter - before[name]).square().mean().sqrt().item()
        assert moved == pytest.approx(0.2 * 0.01, rel=0.25), name


def test_a_schedule_reaches_all_groups_of_muon():
    """The rate of each group is read at each step: with the rest's at 0, only matrices move."""
    own, before = parameters(), parameters()
    optimizer = Muon().build(own)
    for group in optimizer.param_groups[1:]:
        group["lr"] = 0.0
    run([optimizer], own, 2)
    for name, parameter in own.items():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name.startswith("layers.") and parameter.dim() > 1), name
