"""Stashed weights and offloaded activations in one process, where autograd is all that could go wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.parallel.world import World
from penstock.pipeline.ir.schedule import Kind, Schedule, Task, WeightRule, looped
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.offload import HostLink, Offloaded
from penstock.pipeline.run.runtime import Runtime
from penstock.pipeline.run.split_backward import Deferral
from penstock.pipeline.run.stash import Stash
from penstock.policy import create

CPU = torch.device("cpu")


def test_a_backward_sees_the_weights_of_its_forward():
    """Two forwards at version 0, an update in place, one at version 1, another update: d/dx of (w x)^2 = 2 w^2 x, for
    which autograd saves w."""
    weight = nn.Parameter(torch.tensor([[3.0]]))
    stash = Stash([weight])

    def forward(number: float) -> tuple[Tensor, Tensor]:
        x = torch.tensor([[number]], requires_grad=True)
        with stash.recording():
            return x, (x @ weight.T).square().sum()

    passes = [forward(1.0), forward(2.0)]
    with torch.no_grad():
        weight.add_(2.0)
    stash.updated()
    passes.append(forward(1.0))
    with torch.no_grad():
        weight.mul_(10.0)
    for _, loss in passes:
        loss.backward()
    assert [x.grad.item() for x, _ in passes] == [18.0, 36.0, 50.0]


def test_a_version_is_copied_once_and_lives_as_long_as_its_users():
    layer = nn.Linear(4, 4, bias=False)
    stash = Stash(layer.parameters())
    with stash.recording():
        outs = [layer(torch.ones(1, 4, requires_grad=True)) for _ in range(3)]
    kept = [out.grad_fn._saved_mat2 for out in outs]
    assert len({saved.untyped_storage().data_ptr() for saved in kept}) == 1
    assert kept[0].untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr()
    assert torch.equal(kept[0], layer.weight.T)


@pytest.mark.parametrize("split", [False, True])
def test_offloaded_activations_give_the_same_bits(split):
    """Of a block with products, a norm and a nonlinearity; also where W is deferred."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    x = torch.randn(5, 6)
    block(x).square().sum().backward()
    expected = [parameter.grad for parameter in block.parameters()]
    block.zero_grad()
    deferral = Deferral()
    with Offloaded(HostLink(CPU), block.parameters()) as offloaded, deferral if split else contextlib.nullcontext():
        y = block(x)
    offloaded.leave()
    offloaded.call_back()
    offloaded.arrive()
    y.square().sum().backward()
    deferral.run()
    assert all(torch.equal(p.grad, theirs) for p, theirs in zip(block.parameters(), expected, strict=True))


def test_what_leaves_is_a_copy_and_parameters_stay():
    """Overwriting the activation after the forward pass does not matter; the device's own is free to go."""
    weight = nn.Parameter(torch.full((3,), 2.0))
    x = torch.ones(3)
    with Offloaded(HostLink(CPU), [weight]) as offloaded:
        y = (x * weight).square().sum()
    x.zero_()
    offloaded.arrive()
    y.backward()
    assert weight.grad.tolist() == [4.0, 4.0, 4.0]


def test_what_came_back_is_freed_after_its_use():
    """At once, not at the next collection of cycles: a device's memory does not wait for it."""
    weight = nn.Parameter(torch.full((3,), 2.0))
    gc.collect()
    gc.disable()
    try:
        with Offloaded(HostLink(CPU), [weight]) as offloaded:
            y = (torch.ones(3) * weight).square().sum()
        offloaded.leave()
        offloaded.arrive()
        y.backward()
        gone = weakref.ref(offloaded)
        del offloaded, y
        assert gone() is None
    finally:
        gc.enable()


def alone(schedule: Schedule, names: list[list[str]], parameters: dict[str, nn.Parameter]) -> Runtime:
    return Runtime(schedule, Grid(World(), 1), parameters, names, dtype=torch.float64, device=CPU)


def test_what_cannot_be_updated_without_a_flush_is_refused():
    order = [Task(kind, 0, 0) for kind in (Kind.F, Kind.I, Kind.W)]
    schedule = Schedule(looped(1), (tuple(order),), 1, WeightRule.STASH)
    with pytest.raises(UsageError, match="would see later weights"):
        alone(schedule, [["w"]], {"w": nn.Parameter(torch.ones(()))})
    away = dataclasses.replace(create("pipeline.schedule", "pipedream").build(1, 2), offloaded=frozenset({(0, 0)}))
    with pytest.raises(UsageError, match="one version of the weights"):
        alone(away, [["w"]], {"w": nn.Parameter(torch.ones(()))})
    shared = create("pipeline.schedule", "pipedream").build(2, 3)
    with pytest.raises(UsageError, match="w is on several devices"):
        Runtime(shared, Grid(World(0, 2), 2), {}, [["w"], ["w"]], dtype=torch.float64, device=CPU)


def test_a_step_needs_what_its_schedule_needs():
    flushed, stashing = (create("pipeline.schedule", name).build(1, 2) for name in ("1f1b", "pipedream"))
    runtimes = [alone(schedule, [[]], {}) for schedule in (flushed, stashing)]
    for runtime, update in zip(runtimes, (lambda stage: None, None), strict=True):
        with pytest.raises(UsageError, match="weights are updated within a step"):
            runtime.step(lambda *_: (None, None), [(1,)] * 2, update=update)
    sharded = dataclasses.replace(
        flushed,
        orders=(
            (
                Task(Kind.E, 0, 0),
                Task(Kind.F, 0, 0),
                Task(Kind.S, 0, 0),
                Task(Kind.B, 0, 0),
                Task(Kind.T, 0, 0),
                Task(Kind.G, 0, 0),
            ),
        ),
        microbatches=1,
        barriers=1,
    )
    with pytest.raises(UsageError, match="a shard of the vocabulary"):
        alone(sharded, [[]], {}).step(lambda *_: (None, None), [(1,)])
    with pytest.raises(UsageError, match="no common shards"):
        Runtime(sharded, Grid(World(0, 2), 1), {}, [[]], dtype=torch.float64, device=CPU)
