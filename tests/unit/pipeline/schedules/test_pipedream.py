"""PipeDream: its closed forms, and training with its stashed weights against the paper's update rule."""

from __future__ import annotations

import pytest
import torch

from penstock.core.errors import UsageError
from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Kind, WeightRule
from penstock.pipeline.ir.torch_csv import to_csv
from penstock.pipeline.ir.validate import walk
from penstock.pipeline.ir.versions import peak_versions, versions
from penstock.pipeline.simulate.simulator import Costs, simulate
from penstock.policy import create


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 5), (4, 3), (4, 12), (6, 20)])
def test_stage_s_is_p_minus_1_minus_s_updates_behind(p, m):
    schedule = create("pipeline.schedule", "pipedream").build(p, m)
    assert schedule.weights is WeightRule.STASH
    for stage, (order, seen) in enumerate(zip(schedule.orders, versions(schedule), strict=True)):
        assert seen == [max(0, task.microbatch - (p - 1 - stage)) for task in order]
    held = [min(m, p - stage) for stage in range(p)]
    assert simulate(schedule, Costs.even(schedule)).peak_activations == held
    # Before the last update of a run, the newest version has no user yet.
    if m >= p:
        assert peak_versions(schedule) == held


def test_order_is_that_of_1f1b():
    for p, m in ((1, 1), (3, 2), (4, 9)):
        names = ("pipedream", "1f1b")
        assert len({create("pipeline.schedule", name).build(p, m).orders for name in names}) == 1


def test_replicas_share_the_work_round_robin():
    """Two devices for a first stage that takes twice as long as the second: nobody idles in the steady state."""
    schedule = create("pipeline.schedule", "pipedream", replicas=(2, 1)).build(3, 40)
    assert schedule.placement == ((0, 1), (2,))
    assert all(task.microbatch % 2 == task.replica for order in schedule.orders[:2] for task in order)
    even = Costs.even(schedule)
    costs = Costs(**{**vars(even), "forward": (2.0, 1.0), "input_grad": (2.0, 1.0), "weight_grad": (2.0, 1.0)})
    simulation = simulate(schedule, costs)
    assert simulation.makespan <= 40 * 3 + 12
    assert simulation.peak_activations == [2, 2, 1]


def test_training_with_stashed_weights_is_delayed_gradient_descent():
    """w(t+1) = w(t) - lr grad f(w_1(t-n+1), ..., w_n(t)), in fp64: run by the schedule, and by that rule."""
    p, m, size, rate = 4, 11, 5, 0.05
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(p, size, size, generator=generator, dtype=torch.float64) / 3
    inputs = torch.randn(m, 2, size, generator=generator, dtype=torch.float64)

    history = [start]
    for minibatch in range(m):
        delayed = [history[max(0, minibatch - (p - 1 - stage))][stage] for stage in range(p)]
        weights = [weight.clone().requires_grad_() for weight in delayed]
        x = inputs[minibatch]
        for weight in weights:
            x = torch.tanh(x @ weight)
        gradients = torch.autograd.grad(x.square().sum(), weights)
        history.append(history[-1] - rate * torch.stack(gradients))

    schedule = create("pipeline.schedule", "pipedream").build(p, m)
    seen = {
        task: version
        for order, own in zip(schedule.orders, versions(schedule), strict=True)
        for task, version in zip(order, own, strict=True)
    }
    stash = [[start[stage]] for stage in range(p)]
    passed: dict = {}
    for _, task in walk(schedule):
        kind, stage, minibatch, _ = task
        if kind is Kind.F:
            x = inputs[minibatch] if stage == 0 else passed[stage - 1, minibatch][2].detach().requires_grad_()
            weight = stash[stage][seen[task]].clone().requires_grad_()
            passed[stage, minibatch] = (x, weight, torch.tanh(x @ weight))
        else:
            x, weight, y = passed[stage, minibatch]
            output = 2 * y.detach() if stage == p - 1 else passed["gradient", stage + 1, minibatch]
            y.backward(output)
            passed["gradient", stage, minibatch] = x.grad
            stash[stage].append(stash[stage][-1] - rate * weight.grad)
    trained = torch.stack([versions_of_stage[-1] for versions_of_stage in stash])
    assert torch.allclose(trained, history[-1], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(trained, start, rtol=1e-3)


def test_other_numbers_of_devices_are_refused():
    with pytest.raises(RefusalError, match=r"2, 1 replicas take 3 devices, not 4\nIt works with 3 devices"):
        create("pipeline.schedule", "pipedream", replicas=(2, 1)).build(4, 4)


def test_pytorch_cannot_run_it():
    with pytest.raises(UsageError, match="keeps one version"):
        to_csv(create("pipeline.schedule", "pipedream").build(2, 4))
