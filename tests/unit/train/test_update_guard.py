"""Bad updates: told by what is not finite or far from usual, skipped without a trace in the weights, and counted."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from penstock.core.errors import PenstockError
from penstock.core.metrics import read_metrics
from penstock.core.progress import silent
from penstock.train.guard import MOST_IN_A_ROW, SETTLING, Guard
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from penstock.train.update import Updater
from tiny_runs import assert_same_bits, config


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the gradients of the given updates bad: infinite, or a thousand times too large."""

    def poison(**bad: float) -> None:
        computed = Updater.gradients

        def gradients(self, *arguments):
            loss, norms = computed(self, *arguments)
            factor = bad.get(f"at{self.position.step}")
            if factor is not None:
                for master in self.masters:
                    master.grad.mul_(factor)
                norms = {name: norm * factor for name, norm in norms.items()}
            return loss, norms

        monkeypatch.setattr(Updater, "gradients", gradients)

    return poison


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.trainer.model.parameters()]


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_bad_update_is_skipped_and_counted(store, tmp_path, poisoned, factor):
    poisoned(at3=factor, at5=factor)
    run = Run.create(config(store, steps=8, on_bad_update="skip", average="ema"), tmp_path / "run")
    seen = {0: weights(run)}
    assert run.trainer.train(lambda report: seen.__setitem__(report.step, weights(run)))
    unchanged = [
        step for step in range(1, 9) if all(torch.equal(a, b) for a, b in zip(seen[step], seen[step - 1], strict=True))
    ]
    assert unchanged == [4, 6]
    assert run.trainer.position.guard.skipped == 2
    assert run.trainer.position.samples == 8 * 4
    assert run.finish(silent)["skipped_updates"] == 2
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record.get("skipped")] == [4, 6]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)


def test_a_run_without_bad_updates_is_the_same_with_and_without_a_guard(store, tmp_path):
    Run.create(config(store, steps=10), tmp_path / "plain").trainer.train()
    Run.create(config(store, steps=10, on_bad_update="skip", spike=50.0), tmp_path / "guarded").trainer.train()
    plain, guarded = (tmp_path / name / "checkpoints" / "step-00000010" for name in ("plain", "guarded"))
    states = [json.loads((c / "trainer" / "state.json").read_text())["position"] for c in (plain, guarded)]
    assert states[1].pop("guard")["seen"] == 10
    assert states[0].pop("guard")["seen"] == 0
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        assert (plain / name).read_bytes() == (guarded / name).read_bytes()


def test_a_spike_is_skipped_and_a_resumed_run_remembers_what_is_usual(store, tmp_path, poisoned):
    poisoned(at30=1000.0)
    options = {"steps": 34, "on_bad_update": "skip", "spike": 20.0, "checkpoint_steps": 29}
    Run.create(config(store, **options), tmp_path / "whole").trainer.train()
    run = Run.create(config(store, **{**options, "steps": 29}), tmp_path / "run")
    run.trainer.train()
    again = Run.reopen(tmp_path / "run", overrides=["steps=34"])
    assert again.trainer.position.guard == run.trainer.position.guard
    # The schedule counts to another total in the first part: compare what the guard knows, and that it skips.
    again.trainer.train()
    assert again.trainer.position.guard.skipped == 1


def test_skipping_resumes_bit_for_bit(store, tmp_path, poisoned):
    poisoned(at3=math.nan, at25=1000.0)
    options = config(store, steps=30, on_bad_update="skip", spike=20.0, checkpoint_steps=24, keep_checkpoints=5)
    Run.create(options, tmp_path / "whole").trainer.train()
    run = Run.create(options, tmp_path / "run")
    run.trainer.train()
    (tmp_path / "run" / "checkpoints" / "step-00000030" / "config.json").unlink()
    again = Run.reopen(tmp_path / "run")
    assert again.trainer.position.step == 24
    again.trainer.train()
    ours, theirs = (tmp_path / name / "checkpoints" / "step-00000030" for name in ("run", "whole"))
    assert_same_bits(ours, theirs)
    assert again.trainer.position.guard.skipped == 2


def test_what_is_usual_is_the_geometric_mean_of_late_norms():
    guard = Guard()
    norms = [2.0, 8.0, 4.0]
    for norm in norms:
        assert guard.admits(1.0, norm, 10)
    assert guard.typical == pytest.approx(math.prod(norms) ** (1 / 3))
    for _ in range(300):
        guard.admits(1.0, 1.0, None)
    assert guard.typical == pytest.approx(1.0, rel=1e-5)
    before = dataclasses.replace(guard)
    assert not guard.admits(1.0, 10.5, 10)
    assert guard.admits(1.0, 9.5, 10)
    assert (guard.skipped, guard.in_a_row, before.skipped) == (1, 0, 0)


def test_the_first_updates_tell_no_spike():
    guard = Guard()
    assert all(guard.admits(1.0, norm, 2) for norm in [1.0, 1000.0] * (SETTLING // 2))


def test_bad_updates_without_end_end_the_run(store, tmp_path, poisoned):
    poisoned(**{f"at{step}": math.nan for step in range(40)})
    run = Run.create(config(store, on_bad_update="skip"), tmp_path / "run")
    with pytest.raises(PenstockError, match=f"{MOST_IN_A_ROW} updates in a row were bad"):
        train_to_the_end(run, silent)
