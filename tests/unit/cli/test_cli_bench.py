"""``penstock bench``."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.core import bench as bench_module
from penstock.core.errors import UsageError


@pytest.fixture(autouse=True)
def tree(tmp_path, monkeypatch):
    """A source tree with a benchmark whose row is evidence for a paper."""
    (tmp_path / "bench").mkdir()
    script = (
        '"""Counting beside counting."""\n\ndef main(bench):\n'
        '    bench.compare(subject="a", peer="b", setting=bench.device.type, metric="count", unit="",\n'
        "                  run=lambda: 2.0, peer_run=lambda: 1.0, repetitions=3, papers=[3])\n"
    )
    (tmp_path / "bench" / "count.py").write_text(script)
    monkeypatch.setattr(bench_module, "repository", lambda: tmp_path)
    monkeypatch.setattr(bench_module, "results_folder", lambda: tmp_path / "results")
    monkeypatch.setenv("PENSTOCK_COMMIT", "1234567")
    return tmp_path


def bench(*arguments: str) -> str:
    done = CliRunner().invoke(build_app(), ["bench", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_without_a_name_all_are_listed():
    shown = bench()
    assert "count" in shown
    assert "Counting beside counting." in shown


def test_a_benchmark_runs_and_leaves_its_result(tree):
    assert "2.000×" in bench("count", "--device", "cpu")
    (path,) = (tree / "results").iterdir()
    found = json.loads(path.read_text())
    assert path.name == f"count-{found['device']}.json"
    assert found["rows"][0]["papers"] == [3]
    assert (found["rows"][0]["ratio"], found["rows"][0]["repetitions"]) == (2.0, 3)
    assert found["commit"] == "1234567"
    assert "torch" in found["versions"]


def test_a_quick_run_writes_only_where_it_is_told(tree):
    bench("count", "--quick", "--device", "cpu")
    assert not (tree / "results").exists()
    bench("count", "--quick", "--device", "cpu", "--out", str(tree / "mine" / "x.json"))
    assert json.loads((tree / "mine" / "x.json").read_text())["rows"][0]["repetitions"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cuont"], "there is no benchmark 'cuont': did you mean 'count'"),
        (["xyz"], "there is no benchmark 'xyz': known: count"),
        (["count", "--device", "abacus"], "there is no device called 'abacus'"),
    ],
)
def test_wrong_requests_are_usage_errors_and_write_nothing(tree, arguments, message):
    with pytest.raises(UsageError, match=message):
        bench(*arguments)
    assert not (tree / "results").exists()
