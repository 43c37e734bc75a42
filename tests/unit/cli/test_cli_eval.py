"""``penstock eval``: results, resumption, comparison, and what it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.core.errors import PenstockError


def run(*words: object) -> str:
    return CliRunner().invoke(build_app(), ["eval", *map(str, words)], catch_exceptions=False).stdout


def test_two_models_are_evaluated_and_compared(tmp_path):
    asked = ["--tasks", "arithmetic,recall", "--samples", 4, "--option", "recall.pairs=6", "--device", "cpu"]
    folders = [tmp_path / "one", tmp_path / "other"]
    said = [run("python-1m", *asked, "--seed", 1, "--out", folder) for folder in folders]
    rows = [line.split() for line in said[0].splitlines()]
    assert rows[0][:3] == ["task", "metric", "value"]
    assert [row[0] for row in rows[1:3]] == ["arithmetic", "recall"]
    assert rows[1][-2:] == ["Wilson", "4"]
    lines = [json.loads(line) for line in (folders[0] / "results.jsonl").read_text().splitlines()]
    assert sorted(line["place"] for line in lines) == list(range(8))
    compared = run("--compare", *folders)
    assert [line.split()[0] for line in compared.splitlines()] == ["task", "arithmetic", "recall"]
    assert "McNemar, exact" in compared
    # Once more: nothing is asked again, and the table is the same.
    kept = (folders[0] / "results.jsonl").read_text()
    assert run("python-1m", *asked, "--seed", 1, "--out", folders[0]) == said[0]
    assert (folders[0] / "results.jsonl").read_text() == kept


def test_results_have_a_folder_of_their_own_if_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["--tasks", "arithmetic", "--samples", 2, "--device", "cpu"]
    for model in ("python-1m", "python-1m", "python-6m"):
        run(model, *asked)
    assert sorted(path.name for path in (tmp_path / "evals").iterdir()) == ["python-1m", "python-1m-2", "python-6m"]
    # One that was stopped goes on where it was, and so needs no other.
    lines = tmp_path / "evals" / "python-1m-2" / "results.jsonl"
    whole = lines.read_text()
    lines.write_text(whole.splitlines(keepends=True)[0])
    assert "evals/python-1m-2/summary.json" in run("python-1m", *asked)
    assert lines.read_text() == whole
    assert "evals/python-1m-2  evals/python-6m" in run("--compare", "python-1m", "python-6m")


def test_tasks_are_listed_with_their_options():
    said = run("--list")
    assert "arithmetic: Adds, subtracts" in said
    assert "    digits = 2" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which model to evaluate"),
        (["python-1m", "--tasks", "aritmetic", "--out", "x"], "did you mean 'arithmetic'"),
        (["python-1m", "--tasks", "code,code", "--out", "x"], "named twice"),
        (["python-1m", "--tasks", "recall", "-o", "recall.pair=3", "--out", "x"], "no option 'pair'.*'pairs'"),
        (["python-1m", "--tasks", "recall", "-o", "sudoku.empty=3", "--out", "x"], "'sudoku', which is not asked"),
        (["no-such-model", "--tasks", "recall", "--out", "x"], "no-such-model"),
        (["--compare", "x", "y"], "x holds no evaluation"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PenstockError, match=message):
        run(*arguments)
    assert not list(tmp_path.glob("x/*"))
