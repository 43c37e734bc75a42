"""``penstock search``: what it refuses, and how it ends where nothing could be scored."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.core.errors import PenstockError, UsageError
from penstock.search.allocation import seen_in
from penstock.search.scorers.sandbox import containment


def run(*words: str):
    return CliRunner().invoke(build_app(), ["search", "python-1m", *words, "--device", "cpu"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("problem", "options", "message"),
    [
        ({"messages": "hello"}, [], "in.jsonl:1: 'messages' is no list"),
        ({"documents": "a text"}, ["--program", "retrieval"], "in.jsonl:1: 'documents' is no list of texts"),
        ({}, ["--program", "cascade"], "asks the model 'strong', and none was given"),
        ({}, ["--scorer", "reward_model", "--scorer-option", "model=python-1m"], "it is no reward model"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, monkeypatch, problem, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a"} | problem))
    with pytest.raises(UsageError, match=message):
        run("in.jsonl", "--out", "out", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_search_in_which_nothing_could_be_scored_has_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(PenstockError, match="no text could be scored"):  # it has no tests
        run("in.jsonl", "--out", "out", "--scorer", "unit_tests", "-n", "4", "--option", "n=2")
    (record,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert record["ledger"]["failures"] == record["ledger"]["scorings"] == 2


def test_what_contains_code_is_told_where_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "score.py").write_text("def score(problem, text):\n    return 1")
    line = f"code is contained by {containment()}; docs/search.md"
    assert line in run("in.jsonl", "--out", "code", "--scorer", "score.py", "-n", "2").stderr
    assert "contained" not in run("in.jsonl", "--out", "none", "--scorer", "self_certainty", "-n", "2").stderr


def test_how_often_to_try_is_planned_from_texts_that_were_scored_twice(tmp_path, monkeypatch):
    """The verifier accepts texts with an even number of letters; those are right that have a multiple of four."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "def f("}\n{"prompt": "class A"}')
    for name, factor in (("verified", 2), ("known", 4), ("other", 4)):
        (tmp_path / "score.py").write_text(f"def score(problem, text):\n    return len(text) % {factor} == 0")
        shape = ["-n", "6", "--program", "coverage", "--option", "n=8", "--seed", "1" if name == "other" else "0"]
        assert run("in.jsonl", "--out", name, "--scorer", "score.py", *shape).exit_code == 0
    counts = []
    for line in (tmp_path / "verified" / "results.jsonl").read_text().splitlines():
        lengths = [len(node["text"]) for node in json.loads(line)["tree"][1:]]
        good = sum(each % 4 == 0 for each in lengths)
        counts.append((8, good, sum(each % 2 == 0 for each in lengths) - good))
    assert any(good and bad for _, good, bad in counts)
    said = CliRunner().invoke(build_app(), ["plan", "tries", "verified", "known", "--cost", "0"]).stdout
    ceiling = sum(good / (good + bad) for _, good, bad in counts) / 2
    assert f"# The ceiling: {ceiling:.1%} are right" in said and "--option tries=" in said
    said = CliRunner().invoke(build_app(), ["plan", "tries", "verified", "known", "--cost", "100"]).stdout
    assert "Not to answer is worth more" in said
    with pytest.raises(UsageError, match="other has other texts"):
        CliRunner().invoke(build_app(), ["plan", "tries", "verified", "other"], catch_exceptions=False)


def test_runs_of_retrieval_say_what_their_settings_are_worth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a sum", "documents": ["a sum is a + b"]}')
    (tmp_path / "score.py").write_text("def score(problem, text):\n    return 1")
    for name, scored in (("scored", ["--scorer", "score.py"]), ("plain", [])):
        assert run("in.jsonl", "--out", name, "--program", "retrieval", "-n", "4", *scored).exit_code == 0
    (seen,) = seen_in([tmp_path / "scored"])
    assert seen.setting == (2, 1, 1) and seen.accuracy == 1
    with pytest.raises(UsageError, match="plain does not say"):
        seen_in([tmp_path / "plain"])
