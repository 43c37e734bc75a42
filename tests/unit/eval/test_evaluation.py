"""Evaluations as people run them: from Python and by the command, resumed, and compared."""

from __future__ import annotations

import json

import pytest

from penstock import LLM
from penstock.core.errors import UsageError
from penstock.core.progress import silent
from penstock.core.signals import StopRequest
from penstock.eval.contract import Outcome
from penstock.eval.records import Record, compare
from penstock.eval.run import Evaluation, evaluate
from penstock.eval.tasks.arithmetic import Arithmetic
from penstock.eval.tasks.code import Code
from penstock.eval.tasks.recall import Recall

SMALL = [Code.example().model_copy(update={"samples": 3}), Arithmetic(samples=3, digits=1)]


@pytest.fixture(scope="module")
def llm():
    return LLM("python-1m", device="cpu", progress=silent)


def test_results_have_their_outcomes_in_order(llm):
    code, sums = evaluate(llm, SMALL, progress=silent)
    assert (code.task, code.metric, sums.task, sums.metric) == ("code", "bits per byte", "arithmetic", "accuracy")
    total = sum(each.value for each in code.outcomes) / sum(each.weight for each in code.outcomes)
    assert code.estimate.value == pytest.approx(total)
    assert 0 < code.estimate.low <= code.estimate.value <= code.estimate.high < 8
    assert len(sums.outcomes) == 3
    # One at a time comes to the same.
    (alone,) = evaluate(llm, SMALL[0], progress=silent)
    assert [each.value for each in alone.outcomes] == pytest.approx([each.value for each in code.outcomes], rel=1e-4)


def test_a_model_that_knows_all_answers_has_them_right(llm, monkeypatch):
    """The judge hears what the model writes, of each question its own."""
    evaluation = Evaluation([SMALL[1]])
    places = {tuple(SMALL[1].ask(sample, llm.tokenizer)[0]): sample for _, sample in evaluation.samples}
    asked = llm.as_completed

    def knowing(prompts, params, stop):
        for place, output in asked(prompts, params, stop):
            output.outputs[0].text = places[tuple(prompts[place])].reference
            yield place, output

    monkeypatch.setattr(llm, "as_completed", knowing)
    (result,) = evaluate(llm, SMALL[1], progress=silent)
    assert result.estimate.value == 1


def test_a_question_that_is_too_long_is_refused_before_any_is_asked(llm):
    with pytest.raises(UsageError, match=r"a question of recall takes [\d,]+ tokens .* the model reads"):
        evaluate(llm, [SMALL[1], Recall(samples=2, pairs=400)], progress=silent)
    assert not llm.engine.busy


def test_an_evaluation_that_was_stopped_goes_on(llm, tmp_path):
    evaluation = Evaluation(SMALL)
    record = Record(tmp_path, "python-1m", evaluation, chat=False)
    with StopRequest() as stop:
        for count, (place, outcome) in enumerate(evaluation.asked(llm, record.outcomes, stop), start=1):
            record.write(place, outcome)
            stop.wanted = count >= 2
    assert not llm.engine.busy
    assert len(record.close()) < 2
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"place": 5, "ta')  # a process that was killed
    record = Record(tmp_path, "python-1m", evaluation, chat=False)
    done = dict(record.outcomes)
    assert 2 <= len(done) < 6
    asked = []
    with StopRequest() as stop:
        for place, outcome in evaluation.asked(llm, record.outcomes, stop):
            record.write(place, outcome)
            asked.append(place)
    assert sorted([*done, *asked]) == list(range(6))
    results = record.close()
    assert [result.task for result in results] == ["code", "arithmetic"]
    summary = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert summary[0]["value"] == results[0].estimate.value
    assert (summary[1]["samples"], summary[1]["method"]) == (3, "Wilson")


def test_two_evaluations_are_compared_where_they_asked_the_same(tmp_path):
    told = {"python-1m": [1.0, 1.0, 1.0], "python-6m": [0.0, 1.0, 0.0]}
    for model, values in told.items():
        evaluation = Evaluation([SMALL[1]])
        record = Record(tmp_path / model, model, evaluation, chat=False)
        for place, value in enumerate(values):
            record.write(place, Outcome(value))
        record.close()
    (found,) = compare(tmp_path / "python-1m", tmp_path / "python-6m")
    assert found.difference.change.value == pytest.approx(-2 / 3)
    assert found.difference.p == pytest.approx(0.5)
    other = Evaluation([SMALL[1].model_copy(update={"seed": 1})])
    Record(tmp_path / "other", "python-1m", other, chat=False).close()
    with pytest.raises(UsageError, match="no task is finished in both"):
        compare(tmp_path / "python-1m", tmp_path / "other")
    with pytest.raises(UsageError, match="another evaluation: it differs in tasks"):
        Record(tmp_path / "other", "python-1m", Evaluation([SMALL[1]]), chat=False)
    with pytest.raises(UsageError, match="holds no evaluation"):
        compare(tmp_path, tmp_path / "other")
    (tmp_path / "other" / "evaluation.json").write_text("[1]")
    with pytest.raises(UsageError, match="holds no evaluation that can be read"):
        compare(tmp_path / "python-1m", tmp_path / "other")
