"""What each controller is for: beside worked examples, brute force and the closed form."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ConfigError
from penstock.core.randomness import numpy_generator
from penstock.serve.config import EngineConfig
from penstock.speculate.controllers.bass import Bass
from penstock.speculate.controllers.contract import Seen
from penstock.speculate.controllers.fixed import Fixed
from penstock.speculate.controllers.measured import Measured
from penstock.speculate.controllers.tetris import Tetris, likeliest
from penstock.speculate.controllers.thompson import Thompson, best_length
from penstock.speculate.expected import chain_tokens
from penstock.testing.speculate_controller import LOSING, WINNING, Machine, rounds

MOST = 8


def rate(acceptance: float, cost: float, length: int) -> float:
    return chain_tokens(acceptance, length) / (1 + cost * length)


def test_fixed_is_cut_to_what_the_drafter_can():
    assert Fixed(length=9).start(4).ahead(3) == 4
    assert Fixed(length=2).start(4).ahead(3) == 2


def test_bass_grows_where_all_is_accepted_and_shrinks_else():
    control = Bass(first=7, grow=2, shrink=10).start(12)
    lengths = []
    for accepted in ([7, 1], [3, 2], [3, 0], [7, 2], [0, 0]):
        length = control.ahead(2)
        control.learn(Seen(2, 0, length, [length, length], accepted, 0.0, 1.0))
        lengths.append(control.ahead(2))
    # 7 + 2; 9 - 1; 8 - 1 - 1; all 6 and more accepted: 6 + 2; 8 - 1.
    assert lengths == [9, 8, 6, 8, 7]


def test_bass_never_goes_below_what_the_luckiest_accepted():
    control = Bass(first=6, shrink=1).start(8)
    control.learn(Seen(2, 0, 6, [6, 6], [4, 0], 0.0, 1.0))
    assert control.ahead(2) == 4


@given(st.lists(st.lists(st.floats(0, 1), max_size=4), min_size=1, max_size=4), st.integers(0, 10))
def test_tetris_is_the_best_share_of_a_budget(confidence, budget):
    kept = likeliest(confidence, budget)
    assert sum(kept) == min(budget, sum(map(len, confidence)))

    def worth(lengths):
        pairs = zip(confidence, lengths, strict=True)
        return sum(math.prod(each[:end]) for each, length in pairs for end in range(1, length + 1))

    shares = itertools.product(*(range(len(each) + 1) for each in confidence))
    assert worth(kept) == pytest.approx(max(worth(each) for each in shares if sum(each) <= budget), abs=1e-9)


def test_tetris_verifies_so_many_in_the_mean():
    control = Tetris(length=2, extra=2).start(8)
    assert control.ahead(3) == 4
    assert control.kept([[0.9, 0.9, 0.9, 0.9], [0.5, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]]) == [4, 1, 1]


@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [0.1, 0.4])
def test_thompson_comes_to_the_best_length(acceptance, cost):
    best = max(range(1, MOST + 1), key=lambda length: rate(acceptance, cost, length))
    assert best_length(acceptance, cost, MOST) == best
    lengths = rounds(Thompson(cost=cost, memory=1.0).start(MOST), acceptance, cost, 2000)
    early, late = (mean(rate(acceptance, cost, length) for length in part) for part in (lengths[:20], lengths[-500:]))
    assert late >= 0.98 * rate(acceptance, cost, best)
    assert late >= early - 1e-9


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("cost", [0.1, 0.5])
def test_measured_comes_to_the_best_of_its_lengths(acceptance, cost):
    lengths = rounds(Measured().start(MOST), acceptance, cost, 1500)
    best = max(rate(acceptance, cost, length) for length in (0, 1, 2, 3, 4, MOST))
    assert mean(rate(acceptance, cost, length) for length in lengths[-500:]) >= 0.93 * best


def test_measured_drafts_nothing_where_that_loses_and_looks_again_now_and_then():
    lengths = rounds(Measured().start(MOST), 0.3, 1.0, 2000)
    assert 0 < sum(length > 0 for length in lengths[100:]) <= 0.03 * 1900
    control = Measured().start(MOST)
    rounds(control, 0.05, 0.3, 600)
    assert control.ahead(1) == 0
    assert mean(rounds(control, 0.95, 0.1, 3000)[-300:]) > 3


def test_what_trials_lost_is_not_forgotten_where_crowds_change():
    control, lost, spent = Measured(patience=8).start(4), 0.0, 0.0
    for step in range(6000):
        crowd = 1 if step // 20 % 2 else 8
        ahead = control.ahead(crowd)
        seconds = 1.5 if ahead else 1.0
        accepted = [0] * crowd if ahead else []
        control.learn(Seen(crowd, 0, ahead, [ahead] * len(accepted), accepted, 0.0, seconds, crowd, 0))
        spent, lost = spent + seconds, lost + seconds - 1
    assert 0 < lost <= 0.01 * spent + 20


def test_thompson_forgets_what_was_rejected_long_ago():
    control = Thompson(memory=0.9, cost=0.05).start(MOST)
    for accepted in [0] * 400 + [MOST] * 60:
        control.learn(Seen(1, 0, MOST, [MOST], [accepted], 0.0, None, 1, 0))
    assert mean(control.ahead(1) for _ in range(50)) > 0.9 * MOST


@pytest.mark.parametrize("machine", [*LOSING, *WINNING])
def test_measured_does_as_well_where_times_vary(machine):
    """By a tenth, and a step in twenty takes twice as long."""
    draw, best = numpy_generator(0, "varying"), max(map(machine.gain, range(6)))

    class Varying(Machine):
        def seconds(self, length: int) -> float:
            return super().seconds(length) * float(draw.normal(1, 0.1)) * (2 if draw.random() < 0.05 else 1)

    varying = Varying(*dataclasses.astuple(machine))
    # Of its own steps and of the plain ones that it is compared with, the mean is 1.05 times as long.
    speeds = [1.05 * varying.speed(Measured().start(5), 1000, seed) for seed in range(5)]
    assert mean(speeds) >= (0.95 if best == 1 else 0.85) * best


def test_measured_takes_a_crowd_for_one_that_is_nearly_as_large():
    """Where one of sixteen is replaced, fifteen go on beside its prompt: nothing is timed in such a step."""
    control = Measured().start(5)
    Machine(16, 0.010, 0.0015, 0.0, (0.9,) * 5).speed(control, 200, overlapped=False)
    assert control.ahead(16) == control.ahead(15) == control.ahead(13) == 5


def test_measured_takes_another_length_once_that_has_become_faster():
    """A length whose time was taken while the machine was disturbed has its turn again."""
    machine, control = Machine(16, 0.010, 0.0010, 0.004, (0.8,) * 5), Measured(patience=24).start(5)

    def play(steps: int, slow: dict[int, float]) -> Counter[int]:
        lengths = Counter[int]()
        for _ in range(steps):
            length = control.ahead(16)
            lengths[length] += 1
            accepted = ([length] * 13 + [0] * 3) if length else [0] * 16
            seconds = machine.seconds(length) * slow.get(length, 1.0)
            control.learn(Seen(16, 0, length, [length] * 16, accepted, seconds / 2, seconds))
        return lengths

    assert play(60, {3: 2.0, 5: 2.0}).most_common(1)[0][0] == 2
    assert play(500, {})[5] > 250


def test_what_steps_take_is_a_line_between_the_sizes_that_were_timed_and_goes_on_behind_them():
    control = Measured().start(4)
    rows = np.array([1, 2, 3, 4, 8, 16])
    assert control.seconds(rows).tolist() == [1] * 6  # nothing is known
    for size, times in ((2, (1.0, 9.0, 1.0)), (4, (2.0, 2.0, 50.0)), (8, (1.5,))):
        for seconds in times:
            control.learn(Seen(1, 0, 0, [0], [0], 0.0, seconds, rows=size))
    # 1 of 2 rows in the median, 2 of 4, and no less of 8.
    assert control.seconds(rows) == pytest.approx([1, 1, 1.5, 2, 2, 2])
    control.learn(Seen(1, 0, 0, [0], [0], 0.0, 4.0, rows=16))
    assert control.seconds(np.array([12, 16, 24])) == pytest.approx([3, 4, 6])


def test_a_step_that_only_probes_is_no_trial_and_the_next_one_drafts():
    control = Measured(trials=1, patience=4).start(1)
    for length, accepted, seconds in ((0, 0, 1.0), (1, 0, 1.9)):
        assert control.ahead(1) == length
        control.learn(Seen(1, 0, length, [length], [accepted], 0.0, seconds, rows=1 + length))
    while control.ahead(1) == 0:
        control.learn(Seen(1, 0, 0, [0], [0], 0.0, 1.0, rows=1))
    before = control.tokens(1)
    control.learn(Seen(1, 0, 1, [0], [0], 0.0, 1.0, rows=3, probes=2))
    assert control.tokens(1) == before
    assert control.ahead(1) == 1
    control.learn(Seen(1, 0, 1, [1], [0], 0.0, 1.9, rows=5, probes=3))
    assert control.tokens(1) < before
    assert control.ahead(1) == 0


@pytest.mark.parametrize("trial", [0, 1])
def test_measured_drafts_soon_though_the_machine_stood_still_in_a_trial(trial):
    """That is not held against drafting for longer than it takes to make up for a few slow steps."""
    machine, control = WINNING[0], Measured().start(5)
    trials, drafted = 0, 0
    for _ in range(400):
        length = control.ahead(16)
        seconds = machine.seconds(length)
        if length:
            seconds += 5.0 * (trials == trial)
            trials, drafted = trials + 1, drafted + 1
        accepted = [round(machine.tokens(length)) - 1] * 16 if length else []
        control.learn(Seen(16, 0, length, [length] * len(accepted), accepted, 0.0, seconds))
    assert drafted > 100


def test_an_option_without_a_name_is_one_of_the_default():
    assert EngineConfig.model_validate({"draft": "ngram", "controller": {"share": 0.25}}).controller == Measured(
        share=0.25
    )
    with pytest.raises(ConfigError, match="share"):
        EngineConfig.model_validate({"draft": "ngram", "controller": {"share": -1}})
