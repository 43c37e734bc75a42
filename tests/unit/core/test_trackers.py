"""Metrics beside the run's own file."""

from __future__ import annotations

import sys
import types

import pytest

from penstock.core.errors import UsageError
from penstock.core.metrics import MetricsLog, read_metrics
from penstock.core.trackers import WeightsAndBiases


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the library, and what was asked of it."""
    calls = []

    class Running:
        def log(self, values, step):
            if step == 3:
                raise ConnectionError("gone")
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Running()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


def test_a_run_that_goes_on_is_the_same_one_at_wandb(wandb, tmp_path):
    for _ in range(2):
        log = MetricsLog(tmp_path, 0, [WeightsAndBiases(tmp_path, "project", {"steps": 3})])
        log.write(1, {"loss": 2.5})
        log.close()
    first, *_, second, _, end = wandb
    assert end == "finish"
    assert first == second
    assert (first["project"], first["name"], first["resume"], first["config"]) == (
        "project",
        tmp_path.name,
        "allow",
        {"steps": 3},
    )
    assert wandb[1] == (1, {"loss": 2.5})


def test_a_service_that_fails_does_not_end_the_run(wandb, tmp_path):
    log = MetricsLog(tmp_path, 0, [WeightsAndBiases(tmp_path, "project", {})])
    with pytest.warns(UserWarning, match="W&B did not take step 3: gone"):
        log.write(3, {"loss": 1.0})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 1.0}]


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"penstock\[wandb\]"):
        WeightsAndBiases(tmp_path, "project", {})
