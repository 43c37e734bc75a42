"""``penstock search``: what it refuses, and how it ends where nothing could be scored."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.core.errors import PenstockError, UsageError


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
