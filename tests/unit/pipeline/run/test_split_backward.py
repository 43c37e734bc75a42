"""I and W together are the backward pass, and apart they are halves of it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.pipeline.run.split_backward import Deferral
from penstock.testing.pipeline_runtime import dense, sparse

TOKENS = torch.arange(10).reshape(2, 5)


def hidden_sum(model: Decoder, x: torch.Tensor) -> torch.Tensor:
    """The layers on hidden states ``x``, to a scalar."""
    rotary = model.rotary(CausalRows.of(5).positions, x.dtype)
    loss = torch.zeros((), dtype=x.dtype)
    for layer in model.layers:
        x, balance = layer(x, rotary, CausalRows.of(5))
        loss = loss if balance is None else loss + balance
    return loss + (model.norm(x) ** 2 * torch.arange(8)).sum()


def start(model: Decoder, microbatch: int) -> torch.Tensor:
    return (model.embedding(TOKENS + microbatch % 3).detach() * (1 + microbatch)).requires_grad_()


@pytest.mark.parametrize("config", [dense(2), sparse(3)], ids=["dense", "sparse"])
def test_the_halves_add_up_over_microbatches(config):
    """In fp64, with W much later than I and in another order."""
    ours, theirs = (Decoder(config).double().initialize(0) for _ in range(2))
    deferrals, inputs = [Deferral() for _ in range(3)], [start(ours, i) for i in range(3)]
    for x, deferral in zip(inputs, deferrals, strict=True):
        with deferral:
            loss = hidden_sum(ours, x)
        loss.backward()
        reference = x.detach().clone().requires_grad_()
        hidden_sum(theirs, reference).backward()
        torch.testing.assert_close(x.grad, reference.grad, rtol=1e-13, atol=1e-14)
    deferred = {
        name for name, p in ours.named_parameters() if p.grad is None and theirs.get_parameter(name).grad is not None
    }
    matrices = {name for name, p in ours.named_parameters() if p.dim() > 1 and name.startswith("layers.")}
    assert deferred == matrices
    for deferral in (deferrals[1], deferrals[2], deferrals[0]):
        assert deferral.held
        deferral.run()
        assert not deferral.held
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name).grad
        if parameter.grad is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-13, msg=name)


def test_under_autocast_and_with_a_bias():
    """The same dtypes and, to bf16's rounding, the same gradients as PyTorch's."""
    x = torch.randn(4, 3, 8, requires_grad=True)
    ours, theirs = nn.Linear(8, 5), nn.Linear(8, 5)
    theirs.load_state_dict(ours.state_dict())
    other = x.detach().clone().requires_grad_()
    deferral = Deferral()
    with torch.autocast("cpu", torch.bfloat16):
        with deferral:
            out = ours(x)
        expected = theirs(other)
    assert torch.equal(out, expected)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    deferral.run()
    assert ours.weight.grad.dtype == torch.float32
    for mine, reference in ((x, other), (ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=2e-2, atol=5e-2)


def test_a_sparse_layer_under_autocast():
    """Its matrices are cast on the way to the grouped product, and still get their gradients."""
    model = Decoder(sparse(2)).initialize(0)
    reference = Decoder(sparse(2)).initialize(0)
    for half in (model, reference):
        x, deferral = start(half, 0), Deferral()
        with torch.autocast("cpu", torch.bfloat16):
            if half is model:
                with deferral:
                    loss = hidden_sum(half, x)
            else:
                loss = hidden_sum(half, x)
        loss.backward()
        deferral.run()
    for name in ("layers.1.mlp.gate_up", "layers.1.mlp.down", "layers.1.attention.qkv.weight"):
        mine, theirs = model.get_parameter(name).grad, reference.get_parameter(name).grad
        assert (mine - theirs).norm() < 0.02 * theirs.norm(), name


def test_the_fused_grouped_product():
    """The one of GPUs in bf16, which the CPU has too: gradients of the same values as PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in ((24, 16), (3, 8, 16))
    )
    ends = torch.tensor([8, 8, 24], dtype=torch.int32)
    F.grouped_mm(x, weight.transpose(1, 2), offs=ends).float().square().sum().backward()
    expected = x.grad, weight.grad
    x.grad = weight.grad = None
    deferral = Deferral()
    with deferral:
        out = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out.float().square().sum().backward()
    assert weight.grad is None
    deferral.run()
    torch.testing.assert_close((x.grad, weight.grad), expected)


def test_frozen_weights_and_no_grad_owe_nothing():
    layer, deferral = nn.Linear(3, 3), Deferral()
    with deferral, torch.no_grad():
        layer(torch.ones(1, 3))
    layer.requires_grad_(False)
    x = torch.ones(1, 3, requires_grad=True)
    with deferral:
        layer(x).sum().backward()
    assert not deferral.held
    assert torch.equal(x.grad, layer.weight.sum(0, keepdim=True))


def test_hooks_on_saved_tensors_take_no_gradient_away():
    """They may put another tensor in the place of a saved one; the gradient still goes to the parameter."""
    layer, deferral = nn.Linear(3, 2), Deferral()
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.clone(), lambda kept: kept), deferral:
        loss = layer(torch.ones(4, 3, requires_grad=True)).sum()
    loss.backward()
    deferral.run()
    assert torch.equal(layer.weight.grad, torch.full((2, 3), 4.0))


def test_nothing_is_left_after_w():
    """What I freed is free after I, what W needed after W."""
    model, x, deferral = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.ones(2, 4), Deferral()
    kept: list[weakref.ref[torch.Tensor]] = []
    model[0].register_forward_hook(lambda module, given, out: kept.append(weakref.ref(out)))
    with deferral:
        loss = model(x.requires_grad_()).sum()
    loss.backward()
    del loss
    gc.collect()
    assert kept[0]() is None  # the tanh's input
    held = [weakref.ref(tensor) for tensor in deferral.held]
    assert [tuple(tensor().shape) for tensor in held] == [(2, 4)] * 4  # input and output gradient of each matrix
    deferral.run()
    gc.collect()
    assert [tensor() for tensor in held] == [None] * 4
