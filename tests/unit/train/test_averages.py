"""Averages of the weights against closed forms, and what they do to the noise of SGD."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.train.averages.aswa import AggressiveAverage
from penstock.train.averages.contract import Average
from penstock.train.averages.ema import ExponentialMovingAverage
from penstock.train.averages.naswa import NormFilteredAverage


def walk(updates: int) -> list[Tensor]:
    """The weights, float64 [3, 2], before and after each of ``updates``."""
    steps = torch.randn(updates + 1, 3, 2, generator=torch_generator(0, "walk"), dtype=torch.float64)
    return list(steps.cumsum(0))


def averaged(average: Average, iterates: list[Tensor]) -> Tensor:
    """The average after all ``iterates``, of which the first is the initial weights."""
    running = [iterates[0].clone()]
    for count, weights in enumerate(iterates[1:], 1):
        average.update(running, [weights], count)
    return running[0]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# Exponential moving average.


@given(st.floats(0, 0.999), st.integers(1, 60))
def test_ema_weighs_iterates_by_powers_of_its_decay(decay: float, updates: int):
    iterates = walk(updates)
    expected = decay**updates * iterates[0]
    for i in range(1, updates + 1):
        expected = expected + (1 - decay) * decay ** (updates - i) * iterates[i]
    close(averaged(ExponentialMovingAverage(decay=decay, warmup=False), iterates), expected)


def test_early_emas_with_warmup_forget_the_initial_weights():
    """The shares are products of the decays (1 + n) / (10 + n): after 100 updates the beginning is gone."""
    iterates = walk(100)
    decays = [min(0.999, (1 + n) / (10 + n)) for n in range(1, 101)]
    expected = math.prod(decays) * iterates[0]
    for i in range(1, 101):
        expected = expected + (1 - decays[i - 1]) * math.prod(decays[i:]) * iterates[i]
    close(averaged(ExponentialMovingAverage(decay=0.999), iterates), expected)
    assert math.prod(decays) < 1e-9


@pytest.mark.parametrize("persistence", [0.0, 0.9])
def test_ema_damps_stationary_noise_as_predicted(persistence: float):
    """SGD on a quadratic is x <- persistence x + noise, with variance s^2 = 1 / (1 - persistence^2). Its EMA has
    (1-b)/(1+b) (1 + b persistence)/(1 - b persistence) s^2, which is (1-b)/(1+b) s^2 for independent noise."""
    decay, chains = 0.95, 20000
    average = ExponentialMovingAverage(decay=decay, warmup=False)
    draw = torch_generator(0, "noise")
    x, running = torch.zeros(chains), [torch.zeros(chains)]
    for count in range(1, 201):
        x = persistence * x + torch.randn(chains, generator=draw)
        average.update(running, [x], count)
    variance = 1 / (1 - persistence**2)
    damping = (1 - decay) / (1 + decay) * (1 + decay * persistence) / (1 - decay * persistence)
    assert x.var().item() == pytest.approx(variance, rel=0.05)
    assert running[0].var().item() == pytest.approx(damping * variance, rel=0.05)


def test_ema_steadies_rollouts_whose_one_step_loss_is_nearly_the_same():
    """Gradient variance amplification: a gain k, cloned by noisy SGD from an expert, closes the unstable loop
    s <- (1.6 - k) s. One step differs little between iterates, but the state after 60 steps swings by decades."""
    expert, draw = 0.7, torch_generator(0, "gain")
    average = ExponentialMovingAverage(decay=0.98)
    gain, running = torch.tensor(0.0), [torch.tensor(0.0)]
    raw, smooth = [], []
    for count in range(1, 1001):
        gain = gain - 0.1 * (gain - expert + 0.2 * torch.randn((), generator=draw))
        average.update(running, [gain], count)
        raw.append(gain.item())
        smooth.append(running[0].item())

    def decades(gains: list[float]) -> Tensor:
        return 60 * torch.tensor([abs(1.6 - k) for k in gains]).log10()

    late_raw, late_smooth = raw[500:], smooth[500:]
    one_step = max((k - expert) ** 2 for k in late_raw)
    assert one_step < 0.1 * expert**2
    assert decades(late_raw).std() > 1
    assert decades(late_smooth).std() < 0.5 * decades(late_raw).std()


# Means of all iterates, and of those that differ.


@given(st.integers(1, 200))
def test_aswa_is_the_arithmetic_mean(updates: int):
    iterates = walk(updates)
    close(averaged(AggressiveAverage(), iterates), torch.stack(iterates[1:]).mean(0))


@given(st.integers(1, 60))
def test_naswa_without_a_threshold_equals_aswa(updates: int):
    iterates = walk(updates)
    close(averaged(NormFilteredAverage(threshold=0), iterates), averaged(AggressiveAverage(), iterates))


@given(st.floats(0, 2), st.integers(1, 40))
def test_naswa_takes_itself_for_iterates_that_are_near(threshold: float, updates: int):
    """The mean of what was accepted and, for each iterate that was not, the mean of that moment."""
    iterates = walk(updates)
    counted: list[Tensor] = []
    current = iterates[0]
    for weights in iterates[1:]:
        accepted = (weights - current).norm() > threshold * current.norm()
        counted.append(weights if accepted else current)
        current = torch.stack(counted).mean(0)
    close(averaged(NormFilteredAverage(threshold=threshold), iterates), current)


def test_naswa_measures_all_weights_together():
    """A change that is large for one small tensor, and small for the model, is no news."""
    average = NormFilteredAverage(threshold=0.1)
    large, small = torch.full((10,), 10.0), torch.ones(2)
    running = [large.clone(), small.clone()]
    average.update(running, [large, small + 1], 1)
    assert torch.equal(running[1], small)
    average.update(running, [large, small + 10], 2)
    assert torch.equal(running[1], small + 5)


@pytest.mark.parametrize("average", [AggressiveAverage(), NormFilteredAverage()], ids=lambda a: a.policy_name)
def test_averages_vary_less_between_seeds(average: Average):
    """On a noisy quadratic, over 60 seeds. Each seed is averaged on its own."""
    deviations = []
    for seed in range(60):
        draw = torch_generator(seed, "seed")
        noise = torch.randn(60, generator=draw, dtype=torch.float64)
        x, running = torch.tensor([1.0], dtype=torch.float64), [torch.tensor([1.0], dtype=torch.float64)]
        for count, shock in enumerate(noise, 1):
            x = x - 0.5 * (x - 2.0 + shock)
            average.update(running, [x], count)
        deviations.append((x.item(), running[0].item()))
    last, mean = torch.tensor(deviations).var(0)
    assert mean < 0.2 * last
