"""The post-validated step, against one that waits for the whole norm: bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipeline.run.post_validation import PendingStep, squared_norm

STAGES = 3


def stages() -> list[torch.optim.Optimizer]:
    """The AdamW of each stage, over two parameters each; equal at every call."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.optim.AdamW(
            [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,))],
            lr=0.1,
            weight_decay=0.1,
        )
        for _ in range(STAGES)
    ]


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return optimizer.param_groups[0]["params"]


def set_gradients(optimizers: list[torch.optim.Optimizer], scales: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for optimizer, scale in zip(optimizers, scales, strict=True):
        for parameter in parameters(optimizer):
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def whole_and_partial(optimizers: list[torch.optim.Optimizer]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    partial = list(itertools.accumulate(squared_norm(parameters(optimizer)) for optimizer in optimizers))
    return partial[-1], partial


def synchronous_step(optimizers: list[torch.optim.Optimizer], max_norm: float | None) -> None:
    """All stages wait for the norm of all gradients."""
    everything = [parameter for optimizer in optimizers for parameter in parameters(optimizer)]
    whole, _ = whole_and_partial(optimizers)
    if not all(parameter.grad.isfinite().all() for parameter in everything):
        return
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(everything, max_norm, whole.sqrt())
    for optimizer in optimizers:
        optimizer.step()


def assert_equal(ours: list[torch.optim.Optimizer], theirs: list[torch.optim.Optimizer]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for left, right in zip(parameters(mine), parameters(other), strict=True):
            assert torch.equal(left, right)
            assert mine.state.get(left, {}).keys() == other.state.get(right, {}).keys()
            for name, value in mine.state.get(left, {}).items():
                assert torch.equal(value, other.state[right][name]), name


# Norms of one stage's gradients are about 4 times the scale: below, around and above the limit, huge, and not finite.
SCALES = st.sampled_from([0.0, 0.01, 0.1, 0.2, 1.0, 1e18, math.nan, math.inf])


@given(steps=st.lists(st.lists(SCALES, min_size=STAGES, max_size=STAGES), min_size=1, max_size=4))
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_any_run_ends_where_the_synchronous_one_does(steps, max_norm):
    ours, theirs = stages(), stages()
    for seed, scales in enumerate(steps):
        set_gradients(ours, scales, seed)
        set_gradients(theirs, scales, seed)
        whole, partial = whole_and_partial(ours)
        pending = [PendingStep(optimizer, known, max_norm) for optimizer, known in zip(ours, partial, strict=True)]
        for step in pending:
            step.settle(whole)
        synchronous_step(theirs, max_norm)
        assert_equal(ours, theirs)


def test_what_stands_and_what_is_undone():
    """The second stage brings the norm over the limit: the first one steps and takes it back, the others hold back."""
    ours = stages()
    set_gradients(ours, [0.01, 1.0, 0.01], seed=5)
    before = [[p.detach().clone() for p in parameters(optimizer)] for optimizer in ours]
    whole, partial = whole_and_partial(ours)
    pending = [PendingStep(optimizer, known, 1.0) for optimizer, known in zip(ours, partial, strict=True)]
    stepped = [
        any(not torch.equal(p, old) for p, old in zip(parameters(o), olds, strict=True))
        for o, olds in zip(ours, before, strict=True)
    ]
    assert stepped == [True, False, False]
    assert [step.settle(whole) for step in pending] == [False, False, False]

    ours = stages()
    set_gradients(ours, [0.01, 0.01, 0.01], seed=5)
    whole, partial = whole_and_partial(ours)
    pending = [PendingStep(optimizer, known, 1.0) for optimizer, known in zip(ours, partial, strict=True)]
    assert [step.settle(whole) for step in pending] == [True, True, True]


def test_a_norm_just_below_the_limit_is_clipped_as_pytorch_does():
    """PyTorch adds 1e-6 to the norm; the verdict is the same on both sides of that edge."""
    for norm in (1 - 1e-7, 1 - 1e-6, 1 - 2e-6, 1.0):
        ours, theirs = (torch.optim.AdamW([torch.nn.Parameter(torch.ones(1, dtype=torch.float64))]) for _ in range(2))
        for optimizer in (ours, theirs):
            parameters(optimizer)[0].grad = torch.full((1,), norm, dtype=torch.float64)
        whole = squared_norm(parameters(ours))
        PendingStep(ours, torch.zeros((), dtype=torch.float64), 1.0).settle(whole)
        synchronous_step([theirs], 1.0)
        assert_equal([ours], [theirs])


def test_the_sum_of_squares_is_that_of_pytorch():
    (optimizer, *_) = stages()
    set_gradients([optimizer], [2.0], seed=1)
    expected = torch.nn.utils.get_total_norm([parameter.grad.double() for parameter in parameters(optimizer)])
    assert float(squared_norm(parameters(optimizer))) == pytest.approx(float(expected) ** 2, rel=1e-12)
    assert float(squared_norm([torch.nn.Parameter(torch.ones(2))])) == 0
