"""A client's own text as a draft: what it proposes, and that an answer which follows it takes fewer steps."""

from __future__ import annotations

import pytest

from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.messages import Request
from penstock.speculate.drafters.ngram import Ngram
from penstock.speculate.prediction import Prediction
from penstock.testing.drafting_engines import engine_with
from penstock.testing.reference import greedy
from penstock.testing.serve_model import small_model


@pytest.mark.parametrize(
    ("said", "proposed"),
    [
        ([], [5, 6, 7]),
        ([5, 6], [7, 8, 9]),
        ([5, 1], []),  # it has left the prediction
        ([5, 1, 7, 8], [9, 5, 6]),  # and is found again
        ([1, 5, 6], [7, 8, 9]),
        ([5, 6, 7, 8, 9, 5, 6], [3]),
        ([5, 6, 7, 8, 9, 5, 6, 3], []),
        ([5, 6, 7, 0, 5, 6], [3]),  # of two places the next one
    ],
)
def test_it_follows_the_answer(said, proposed):
    draft = Prediction([5, 6, 7, 8, 9, 5, 6, 3], 3)
    draft.extend(said)
    assert draft.propose(9) == proposed
    assert draft.propose(1) == proposed[:1]


@pytest.mark.parametrize("wrong", [False, True])
def test_an_answer_that_was_predicted_takes_fewer_steps(wrong):
    prompt = [3, 1, 4, 1, 5]
    answer = greedy(small_model(), prompt, 24)
    prediction = [*answer[:10], 49, *answer[11:]] if wrong else answer
    engine = engine_with(Ngram())
    sampling = SamplingParams(temperature=0, max_tokens=24, prediction=tuple(prediction))
    engine.add(Request("1", prompt, sampling))
    told: list[int] = []
    drafted = accepted = 0
    while engine.busy:
        for delta in engine.step():
            told += delta.tokens
            drafted, accepted = drafted + delta.drafted, accepted + delta.accepted
    assert told == answer
    assert 16 <= accepted <= drafted
    assert engine.snapshot().steps <= 10
    now = engine.snapshot()
    assert (sum(now.drafted_at), sum(now.accepted_at)) == (drafted, accepted)
    assert now.output_tokens == now.sequence_steps + accepted
