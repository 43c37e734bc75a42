"""Schedules against closed forms, PyTorch's and transformers' own, and small stochastic problems."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup

from penstock.core.config import build
from penstock.core.errors import ConfigError
from penstock.core.randomness import numpy_generator
from penstock.policy import create
from penstock.testing.train_schedule import check_branch
from penstock.train.config import TrainConfig
from penstock.train.schedules.constant import Constant
from penstock.train.schedules.cosine import CosineDecay
from penstock.train.schedules.gradual import GradualWarmup
from penstock.train.schedules.linear import LinearDecay
from penstock.train.schedules.refined import POINTS, Refined, smoothed_norms
from penstock.train.schedules.refined_sgd import RefinedForSGD
from penstock.train.schedules.wsd import WarmupStableDecay


def test_linear_decay_ends_at_one_step_of_its_slope():
    assert [LinearDecay().factor(t, 4) for t in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [LinearDecay(warmup_steps=3).factor(t, 10) for t in range(4)] == [0.25, 0.5, 0.75, 0.7]


# Cosine.


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_equals_pytorch(floor: float):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=floor)
    for step in range(50):
        assert math.isclose(CosineDecay(floor=floor).factor(step, 50), theirs.get_last_lr()[0], abs_tol=1e-12)
        optimizer.step()
        theirs.step()


def test_cosine_after_a_warmup_equals_transformers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (theirs,) = get_cosine_schedule_with_warmup(optimizer, 10, 70).lr_lambdas
    ours = CosineDecay(floor=0.0, warmup_steps=10)
    assert all(math.isclose(ours.factor(step, 70), theirs(step), abs_tol=1e-12) for step in range(10, 71))


def test_cosine_is_at_its_floor_once_the_run_is_over():
    """Also where an estimated total has fallen below the warm-up."""
    schedule = CosineDecay(floor=0.1, warmup_steps=10)
    assert [schedule.factor(*question) for question in ((70, 70), (71, 70), (10, 10), (12, 5))] == [0.1] * 4


# Warm-up, stable, decay.


def test_wsd_equals_its_closed_form_at_every_boundary():
    schedule = WarmupStableDecay(warmup_steps=4, decay=0.25, floor=0.0625)
    assert [schedule.factor(t, 40) for t in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert {schedule.factor(t, 40) for t in range(4, 31)} == {1.0}
    # 0.0625 = 0.5 ** 4 over 10 updates: a half for every 2.5.
    for step in range(30, 41):
        assert math.isclose(schedule.factor(step, 40), 0.5 ** ((step - 30) / 2.5), rel_tol=1e-12)
    assert schedule.factor(41, 40) == schedule.factor(40, 40)


@given(
    short=st.integers(10, 1000),
    more=st.integers(0, 1000),
    decay=st.floats(0.01, 1.0),
    warmup_steps=st.integers(0, 100),
    share=st.floats(0, 1),
)
def test_wsd_branches_anywhere_before_its_decay(short: int, more: int, decay: float, warmup_steps: int, share: float):
    """Checkpoints before the short run's decay are the long run's, so that resuming one there is the short run."""
    schedule = WarmupStableDecay(decay=decay, warmup_steps=warmup_steps)
    check_branch(schedule, int(share * schedule.decay_start(short)), short + more, short)


def test_wsd_does_not_branch_within_its_decay():
    with pytest.raises(AssertionError):
        check_branch(WarmupStableDecay(decay=0.5), 60, 1000, 100)
    with pytest.raises(AssertionError):
        check_branch(CosineDecay(), 10, 1000, 100)


def test_the_decay_reaches_the_noise_floor_of_its_last_rate():
    """SGD at rate r on h x^2 / 2 with gradient noise s: the variance obeys an exact recursion, and settles at
    r s^2 / (h (2 - r h))."""
    curvature, noise, peak, total = 2.0, 1.0, 0.2, 20000
    schedule = WarmupStableDecay(decay=0.2, floor=0.01)

    def floor_at(rate: float) -> float:
        return rate * noise**2 / (curvature * (2 - rate * curvature))

    variance, before_decay = 9.0, 0.0
    for step in range(total):
        rate = peak * schedule.factor(step, total)
        before_decay = variance if step == schedule.decay_start(total) else before_decay
        variance = (1 - rate * curvature) ** 2 * variance + (rate * noise) ** 2
    assert math.isclose(before_decay, floor_at(peak), rel_tol=1e-6)
    assert math.isclose(variance, floor_at(peak * 0.01), rel_tol=0.2)


# Gradual warm-up.


def test_gradual_warmup_starts_at_the_small_batch_rate():
    schedule = GradualWarmup(growth=4, warmup_steps=3, after=LinearDecay())
    assert [schedule.factor(t, 10) for t in range(5)] == pytest.approx([0.25, 0.5, 0.75, 0.7, 0.6])


@given(st.integers(0, 30), st.integers(0, 100))
def test_after_the_gradual_warmup_comes_the_other_schedule(warmup_steps: int, step: int):
    """As if the warm-up had been its own: the cosine starts at its top."""
    schedule = GradualWarmup(warmup_steps=warmup_steps, after=CosineDecay(floor=0.0))
    if step >= warmup_steps:
        assert schedule.factor(step, 90) == CosineDecay(floor=0.0, warmup_steps=warmup_steps).factor(step, 90)


def test_gradual_warmup_avoids_the_divergence_of_the_scaled_rate():
    """On x^4 / 4 from x = 3, the curvature is 27 at first: the rate 0.3 throws x off, and warmed up it converges."""

    def descend(schedule) -> float:
        x = 3.0
        for step in range(300):
            x -= 0.3 * schedule.factor(step, 300) * x**3
            if abs(x) > 1e6:
                return math.inf
        return abs(x)

    assert descend(LinearDecay()) == math.inf
    assert descend(GradualWarmup(growth=8, warmup_steps=15)) < 0.15


def test_a_second_warmup_is_refused():
    with pytest.raises(ConfigError, match="there is one warm-up"):
        create("train.schedule", "gradual", after={"name": "linear", "warmup_steps": 3})


# Refined schedules.

NORMS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


@given(NORMS)
def test_refined_factors_equal_the_formula(norms: list[float]):
    """w_t times the sum of all later w, over the largest such product; the norm after the last update is the last."""
    for schedule, power in ((Refined(norms=norms), 1), (RefinedForSGD(norms=norms), 2)):
        weights = [norm**-power for norm in [*norms, norms[-1]]]
        rates = [w * sum(weights[t + 1 :]) for t, w in enumerate(weights)]
        expected = [rate / max(rates) for rate in rates]
        factors = [schedule.factor(t, len(norms)) for t in range(len(norms) + 1)]
        assert factors == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(st.floats(1e-6, 1e6), st.integers(1, 300), st.floats(1, 1e6), st.floats(0, 1.2))
def test_constant_norms_give_linear_decay(norm: float, points: int, total: float, progress: float):
    step = int(progress * total)
    for policy in (Refined, RefinedForSGD):
        factor = policy(norms=[norm] * points).factor(step, total)
        assert math.isclose(factor, LinearDecay().factor(step, total), abs_tol=1e-12)


def test_a_spike_at_the_start_gives_a_warmup():
    norms = [10 * math.exp(-t / 5) + 1 for t in range(100)]
    factors = [Refined(norms=norms).factor(t, 100) for t in range(101)]
    peak = factors.index(1.0)
    assert 5 < peak < 30
    assert factors[0] < 0.15
    assert factors == sorted(factors[:peak]) + sorted(factors[peak:], reverse=True)


def test_a_late_drop_gives_rapid_annealing():
    """While norms fall the schedule stays up, and it then falls faster than linear decay ever does."""
    norms = [1.0] * 80 + [0.25] * 20
    factors = [Refined(norms=norms).factor(t, 100) for t in range(101)]
    assert factors.index(1.0) == 80
    assert factors[90] == pytest.approx(0.5)
    assert factors[80] - factors[90] > 4 * (1 / 100) * 10


def write_run(folder: Path, **series: list[float]) -> Path:
    """A run folder whose metrics hold the given series."""
    values = zip(*series.values(), strict=True)
    rows = [{"step": step, **dict(zip(series, row, strict=True))} for step, row in enumerate(values, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_norms_are_read_from_a_former_run(tmp_path: Path):
    """Each policy takes its own metric, and the configuration then holds numbers, not the path."""
    run = write_run(tmp_path, loss=[1.0] * 4, grad_norm=[5.0, 4.0, 3.0, 2.0], grad_l1=[50.0, 20.0, 20.0, 10.0])
    assert create("train.schedule", "refined", norms=str(run)) == Refined(norms=[50, 20, 20, 10])
    assert create("train.schedule", "refined_sgd", norms=run) == RefinedForSGD(norms=[5, 4, 3, 2])
    model = {"hidden": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "ffn": 8}
    tree = {"model": model, "steps": 10, "schedule": {"name": "refined", "norms": str(run)}}
    config = build(TrainConfig, tree)
    assert json.loads(config.model_dump_json())["schedule"]["norms"] == [50, 20, 20, 10]


def test_the_median_filter_drops_outliers_but_not_the_start(tmp_path: Path):
    norms = [9.0 if t < 3 else 1000.0 if t % 50 == 7 else 1.0 for t in range(400)]
    smooth = smoothed_norms(write_run(tmp_path, grad_norm=norms), "grad_norm")
    assert len(smooth) == POINTS
    assert smooth[0] == 9.0
    assert set(smooth[12:]) == {1.0}


@given(st.integers(1, POINTS), st.integers(0, 2**32))
def test_the_median_filter_equals_brute_force(tmp_path_factory: pytest.TempPathFactory, count: int, seed: int):
    """The window is a tenth of the run; before it lie copies of the first norm, after it mirror images."""
    norms = numpy_generator(seed, "norms").uniform(0.1, 10, count).tolist()
    run = write_run(tmp_path_factory.mktemp("run"), grad_norm=norms)
    half = int(0.1 * count) // 2

    def at(i: int) -> float:
        return norms[0] if i < 0 else norms[i] if i < count else norms[2 * (count - 1) - i]

    expected = [float(np.median([at(i) for i in range(centre - half, centre + half + 1)])) for centre in range(count)]
    assert smoothed_norms(run, "grad_norm") == expected


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (None, "there is no 'grad_l1'"),
        ('{"step": 1, "loss": 2.0}\n', "there is no 'grad_l1'"),
        ('{"step": 1, "grad_l1": 0.0}\n', "norms.0: Input should be greater"),
        ('{"step": 1, "grad_l1": NaN}\n', "norms.0"),
    ],
)
def test_a_run_without_usable_norms_is_refused(tmp_path: Path, contents: str | None, complaint: str):
    if contents is not None:
        (tmp_path / "metrics.jsonl").write_text(contents)
    with pytest.raises(ConfigError, match=complaint):
        create("train.schedule", "refined", norms=str(tmp_path))


def absolute_deviations(rate: float, factors: np.ndarray, noise: np.ndarray, seeds: int) -> tuple[float, np.ndarray]:
    """SGD on least absolute deviations, with ``noise`` added to each step's gradient.

    Returns:
        The mean loss of the last iterates over seeds, and the mean gradient norm at each step.
    """
    fixed, draws = numpy_generator(0, "problem"), numpy_generator(0, "draws")
    rows = fixed.standard_normal((500, 10))
    wanted = rows @ fixed.standard_normal(10) + 0.5 * fixed.standard_t(2, 500)
    x, norms = np.zeros((seeds, 10)), []
    for factor, scale in zip(factors, noise, strict=True):
        chosen = draws.integers(0, 500, seeds)
        row = rows[chosen]
        gradient = np.sign((row * x).sum(1) - wanted[chosen])[:, None] * row + scale * draws.standard_normal(x.shape)
        norms.append(np.linalg.norm(gradient, axis=1).mean())
        x = x - rate * factor * gradient
    return float(np.abs(x @ rows.T - wanted).mean()), np.array(norms)


UPDATES = 300
NOISES = {
    "even": np.full(UPDATES, 0.1),
    "loud at the start": np.where(np.arange(UPDATES) < 100, 10.0, 0.1),
    "falling": np.linspace(10.0, 0.0, UPDATES),
}


@pytest.mark.parametrize("noise", NOISES)
def test_refined_is_no_worse_on_convex_stochastic_problems(noise: str, tmp_path: Path):
    """Last-iterate loss over 40 seeds, each schedule at its best rate: at most 1 percent above linear and cosine where
    norms are even, and far below where they are not."""

    def best(schedule) -> tuple[float, np.ndarray]:
        factors = np.array([schedule.factor(t, UPDATES) for t in range(UPDATES)])
        results = [absolute_deviations(rate, factors, NOISES[noise], 40) for rate in 2.0 ** np.arange(-9, 0)]
        return min(results, key=lambda result: result[0])

    linear, norms = best(LinearDecay())
    cosine, _ = best(CosineDecay(floor=0.0))
    run = write_run(tmp_path, grad_norm=norms.tolist())
    refined, _ = best(create("train.schedule", "refined_sgd", norms=run))
    assert refined <= min(linear, cosine) * (1.01 if noise == "even" else 0.7)


def test_a_constant_rate_stays_at_the_peak():
    assert {Constant(warmup_steps=3).factor(step, 10) for step in range(3, 10)} == {1.0}


@pytest.mark.parametrize("total", [60, 1000, 10**6])
def test_a_warmup_is_a_share_of_the_run_by_default(total):
    """However short the run, its rate reaches the peak."""
    schedule = TrainConfig(start_from="x", steps=total).schedule
    factors = [schedule.factor(step, total) for step in range(0, total, max(1, total // 1000))]
    assert max(factors) > 0.93
    assert schedule.factor(0, total) < 0.5
    assert schedule.warmup_updates(total) == total // 20


def test_two_measures_of_a_warmup_are_refused():
    with pytest.raises(ConfigError, match="either warmup, a share of the run, or warmup_steps"):
        create("train.schedule", "linear", warmup=0.1, warmup_steps=3)
