"""Compiled layers: one graph for all of them, and I and W still apart."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from penstock.core.devices import can_compile
from penstock.models.attention import PackedRows
from penstock.models.decoder import Decoder
from penstock.pipeline.run.compiled import compile_layers, compiled, use_eager
from penstock.pipeline.run.split_backward import Deferral
from penstock.testing.pipeline_runtime import dense, sparse
from penstock.testing.pipeline_training import check_config, options
from penstock.testing.ranks import agreed

TOKENS, CONTEXT = torch.arange(10).reshape(2, 5), PackedRows.of(torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]))


@pytest.fixture
def quickly(monkeypatch):
    """Graphs are traced and differentiated as always, and then run by PyTorch's own operators, to the last bit."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loss_of(model: Decoder, x: torch.Tensor) -> torch.Tensor:
    """The layers on hidden states, to a scalar."""
    rotary = model.rotary(CONTEXT.positions, x.dtype)
    total = torch.zeros((), dtype=x.dtype)
    for layer in model.layers:
        x, balance = layer(x, rotary, CONTEXT)
        total = total if balance is None else total + balance
    return total + (x.square() * torch.arange(8)).sum()


@pytest.mark.parametrize(
    ("config", "graphs"),
    [pytest.param(dense(2), 2, id="dense"), pytest.param(sparse(3), 4, id="sparse", marks=pytest.mark.slow)],
)
def test_the_halves_are_those_of_layers_that_are_not_compiled(quickly, config, graphs):
    """Whole and split, some microbatches under way at once, W in another order; in fp64, bit for bit."""
    ours, theirs = (Decoder(config).double().initialize(0) for _ in range(2))
    compile_layers(ours)
    deferrals = [None, Deferral(), Deferral(), Deferral()]
    losses = []
    for number, deferral in enumerate(deferrals):
        x, y = ((ours.embedding(TOKENS).detach() * (1 + number)).requires_grad_() for _ in range(2))
        if deferral is None:
            loss = loss_of(ours, x)
        else:
            with deferral:
                loss = loss_of(ours, x)
        reference = loss_of(theirs, y)
        losses.append((loss, x, reference, y))
    for loss, x, reference, y in losses:
        loss.backward()
        reference.backward()
        assert torch.equal(loss, reference)
        assert torch.equal(x.grad, y.grad)
    matrices = [name for name, _ in ours.named_parameters() if name.endswith("qkv.weight")]
    assert matrices
    for name in matrices:  # those of three microbatches are still to come
        assert not torch.equal(ours.get_parameter(name).grad, theirs.get_parameter(name).grad)
    for deferral in (deferrals[2], deferrals[3], deferrals[1]):
        assert deferral.held
        deferral.run()
        assert not deferral.held
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name).grad
        if parameter.grad is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert counters["stats"]["unique_graphs"] == graphs
    use_eager(ours)
    assert "forward" not in vars(ours.layers[0])


@pytest.mark.slow
def test_under_autocast_products_are_in_bf16(quickly):
    """W too, as without compiling."""
    ours, theirs = (Decoder(dense(1)).initialize(0) for _ in range(2))
    compile_layers(ours)
    gradients = []
    for model in (ours, theirs):
        deferral = Deferral()
        x = theirs.embedding(TOKENS).detach().requires_grad_()
        with deferral, torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x)
        loss.backward()
        assert {held.dtype for held in deferral.held} == {torch.bfloat16}
        deferral.run()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0.05, atol=0.05, msg=name)


def test_a_compiled_function_takes_no_part_in_a_deferral(quickly):
    weight = torch.randn(3, 4, requires_grad=True)
    deferral = Deferral()
    with deferral:
        out = compiled(torch.nn.functional.linear)(torch.randn(2, 4), weight)
    out.sum().backward()
    assert not deferral.held
    assert weight.grad is not None


@pytest.mark.parametrize(
    "pipeline",
    [
        {"schedule": "zb_h1"},
        pytest.param({"schedule": "pipedream"}, marks=pytest.mark.slow),
        pytest.param({"schedule": "v_half"}, marks=pytest.mark.slow),
        pytest.param({"schedule": "1f1b", "transforms": ["2bp"]}, marks=pytest.mark.slow),
        pytest.param(
            {"schedule": "gpipe", "transforms": [{"name": "pipeoffload", "times": {"host": 0.1}}]},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"schedule": "1f1b", "transforms": [{"name": "vocabulary", "times": {"output": 2.0}}]},
            marks=pytest.mark.slow,
        ),
        pytest.param({"schedule": "zb_h2", "post_validation": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_updates_with_compiled_stages_are_those_of_one_device(quickly, tmp_path, pipeline):
    def work(world):
        torch.set_num_threads(1)
        stashes = pipeline["schedule"] == "pipedream"
        changes = {"clip": None, "model": {"tied": False}} if stashes else {}
        return check_config(options(2, 4, 4, pipeline, **changes), world, tmp_path, compiled=True)

    assert agreed(2, work) == [[], []]


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_with_the_compiler_itself(tmp_path, schedule):
    torch._dynamo.reset()

    def work(world):
        torch.set_num_threads(1)
        return check_config(options(2, 4, 4, {"schedule": schedule}), world, tmp_path, compiled=True)

    assert agreed(2, work) == [[], []]
