"""``penstock batch``: what it refuses."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.core.errors import UsageError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model", "in.jsonl", "out.jsonl"], "no-such-model"),
        (["python-1m", "none.jsonl", "out.jsonl"], "there is no none.jsonl"),
        (["python-1m", "in.jsonl", "nowhere/out.jsonl"], "there is no nowhere"),
        (["python-1m", "in.jsonl", "./in.jsonl"], "the same file"),
        (["python-1m", "in.jsonl", "out.jsonl", "--set", "token=9"], "did you mean 'tokens'"),
        (["python-1m", "in.jsonl", "out.jsonl", "--set", "batching=orka"], "did you mean 'orca'"),
        (["python-1m", "in.jsonl", "out.jsonl", "--draft", "ngrm"], "did you mean 'ngram'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(build_app(), ["batch", *arguments], catch_exceptions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert (tmp_path / "in.jsonl").read_text() == "{}\n"
