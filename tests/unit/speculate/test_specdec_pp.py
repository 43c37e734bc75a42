"""SpecDec++: its threshold beside the best decision there is, and the distribution of what comes out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from penstock.core.config import build
from penstock.core.errors import ConfigError, UsageError
from penstock.serve.build import build_engine
from penstock.serve.config import EngineConfig
from penstock.speculate.controllers.specdec_pp import SpecDecPlusPlus
from penstock.speculate.drafters.model import Model
from penstock.speculate.verifiers.accept_residual import AcceptResidual
from penstock.testing.serve_model import small_draft, small_model
from penstock.testing.speculate_controller import check_predictions
from penstock.testing.stopping import Process, best_threshold, cost_of, optimum

PROCESSES = [
    Process(((0.95, 0.6), (0.3, 0.4)), cost=0.1, most=8),
    Process(((1.0, 0.5), (0.5, 0.3), (0.05, 0.2)), cost=0.2, most=7),
    Process(((0.9, 0.5), (0.8, 0.5)), cost=0.05, most=10),
    Process(((0.99, 0.7), (0.01, 0.3)), cost=0.3, most=9),
]


@pytest.mark.parametrize("process", PROCESSES)
def test_the_best_decision_is_a_threshold_on_the_probability_of_a_rejection(process):
    best = optimum(process)
    threshold = best_threshold(process, best.cost)
    for (depth, product), goes_on in best.goes_on.items():
        assert goes_on == (depth < process.most and 1 - product <= threshold)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_rule_costs_what_the_best_decision_does_and_less_than_any_fixed_length(process):
    best = optimum(process)
    rule = SpecDecPlusPlus(threshold=best_threshold(process, best.cost)).start(process.most)
    found = cost_of(process, rule.goes_on)
    assert found == pytest.approx(best.cost, rel=1e-12)
    fixed = min(cost_of(process, lambda drafted, k=k: len(drafted) < k) for k in range(process.most + 1))
    alike = process.chances[0][0] - process.chances[-1][0] < 0.2  # there is little to know of a token
    assert found < fixed * (1 + 1e-12 if alike else 0.99)
    for other in (0.1, 0.5, 0.9):  # other thresholds are worse, or come to the same
        assert cost_of(process, SpecDecPlusPlus(threshold=other).start(process.most).goes_on) >= found - 1e-12


def test_a_fixed_length_costs_what_the_closed_form_says():
    process = Process(((0.9, 0.5), (0.5, 0.5)), cost=0.2, most=5)
    tokens = (1 - 0.7**4) / (1 - 0.7)
    assert cost_of(process, lambda drafted: len(drafted) < 3) == pytest.approx(1.6 / tokens)


def texts_law(stop, drop, length=3):
    """The chances of all texts of ``length`` tokens on a model that is a table, where another one drafts up to two
    tokens, and ends by ``stop`` of what it has drafted; ``drop`` says whether the last of these is not verified."""
    draw = torch.Generator().manual_seed(0)
    tables = torch.rand(2, 40, 3, generator=draw, dtype=torch.float64).softmax(-1)
    verifier = AcceptResidual()

    def row(which, text):
        return tables[which, sum((token + 1) * 4**place for place, token in enumerate(text)) % 40]

    def drafted(text, window):
        """All that may be drafted, with its chance."""
        if len(window) == 2 or (window and stop(window)):
            yield (window[:-1] if window and drop(window) else window), 1.0
            return
        for token in range(3):
            chance = float(row(1, (*text, *window))[token])
            for whole, share in drafted(text, (*window, token)):
                yield whole, chance * share

    found = {}

    def settle(text, window, chance):
        """One token after the other is accepted, or drawn instead."""
        if len(text) >= length or not chance:
            found[text[:length]] = found.get(text[:length], 0.0) + chance
            return
        target = row(0, text)
        if not window:
            for token in range(3):
                step((*text, token), chance * float(target[token]))
            return
        out = verifier.chances(target[None], row(1, text)[None], torch.tensor([window[:1]]))[0]
        for token in range(3):
            share = chance * float(out[token])
            if token == window[0]:
                settle((*text, token), window[1:], share)
            elif share:
                step((*text, token), share)

    def step(text, chance):
        if len(text) >= length:
            found[text[:length]] = found.get(text[:length], 0.0) + chance
            return
        for window, share in drafted(text, ()):
            settle(text, window, chance * share)

    step((), 1.0)
    exact = {
        text: math.prod(float(row(0, text[:place])[token]) for place, token in enumerate(text))
        for text in itertools.product(range(3), repeat=length)
    }
    return sum(abs(found.get(text, 0.0) - chance) for text, chance in exact.items()) / 2


def test_stopping_behind_a_token_by_what_it_is_leaves_the_distribution_alone():
    stops = [lambda w: w[-1] == 0, lambda w: sum(w) % 2 == 1, lambda w: w == (2,)]
    for stop in stops:
        assert texts_law(stop, lambda window: False) < 1e-12
    # To throw the token away by what it is would not.
    assert texts_law(stops[0], lambda window: window[-1] == 0) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_an_engine_drafts_as_far_as_any_threshold_says(threshold):
    check_predictions(SpecDecPlusPlus(threshold=threshold))


def test_a_model_without_a_head_is_refused():
    config = EngineConfig(draft=Model(source="a model"), controller="specdec_pp", cache_tokens=400)
    with pytest.raises(UsageError, match="needs a head that predicts what is accepted"):
        build_engine(small_model(), config, draft=small_draft())


def test_what_it_cannot_decide_is_refused():
    with pytest.raises(ConfigError, match="'ngram' has no model: draft with one"):
        build(EngineConfig, {"draft": "ngram", "controller": "specdec_pp"})
    with pytest.raises(ConfigError, match="'specdec_pp' weighs chains: leave draft_tree out"):
        build(EngineConfig, {"draft": "python-1m", "draft_tree": "3,2", "controller": "specdec_pp"})
