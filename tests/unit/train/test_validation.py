"""Validation while a run is under way."""

from __future__ import annotations

import json
import types

import pytest

from penstock.core.metrics import read_metrics
from penstock.core.progress import silent
from penstock.data.store import TokenStore
from penstock.models import hub
from penstock.train import checkpoint
from penstock.train.evaluate import bits_per_byte
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from penstock.train.validation import Validation, beginning_of
from tiny_runs import assert_same_bits, config


def validated(folder) -> dict[int, float]:
    key = "validation_bits_per_byte"
    return {r["step"]: r[key] for r in read_metrics(folder / "metrics.jsonl") if key in r}


def test_a_run_is_validated_every_so_many_updates_as_its_checkpoints_are(store, tmp_path):
    """The figures are those of the checkpoints of the same steps, on the same documents; training is left alone."""
    options = {"steps": 20, "checkpoint_steps": 5, "keep_checkpoints": 9}
    Run.create(config(store, **options), tmp_path / "plain").trainer.train()
    validation = {"every": 5, "tokens": 3000, "keep_best": False}
    run = Run.create(config(store, **options, validation=validation), tmp_path / "run")
    assert train_to_the_end(run, silent)
    found = validated(tmp_path / "run")
    assert list(found) == [5, 10, 15, 20]
    sample = beginning_of(TokenStore.open(store).split("held_out"), 3000)
    for step, measured in found.items():
        model = hub.load(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        assert measured == pytest.approx(bits_per_byte(model, sample, window=32), rel=1e-6)
    one, other = (tmp_path / name / "checkpoints" / "step-00000020" / "model.safetensors" for name in ("run", "plain"))
    assert one.read_bytes() == other.read_bytes()


def test_the_best_checkpoint_stays(store, tmp_path, monkeypatch):
    """Here the third validation is the best; the checkpoint of its step outlives newer ones, also after a restart."""
    figures = iter([3.0, 2.5, 2.0, 2.2, 2.1, 2.3, 2.4])
    monkeypatch.setattr(Validation, "measure", lambda self, *_: next(figures))
    options = config(store, steps=20, checkpoint_steps=10, keep_checkpoints=1, validation={"every": 4})
    run = Run.create(options, tmp_path / "run")
    run.trainer.train()
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run.trainer.checkpoints)] == [12, 20]
    again = Run.reopen(tmp_path / "run", overrides=["steps=26"])
    assert (again.trainer.position.best, again.trainer.position.best_step) == (2.0, 12)
    summary = train_to_the_end(again, silent)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run.trainer.checkpoints)] == [12, 26]
    assert (summary["best_step"], summary["best_bits_per_byte"]) == (12, 2.0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_validation_is_capped(store):
    held_out = TokenStore.open(store).split("held_out")
    for tokens in (1, 500, 10**9):
        sample = beginning_of(held_out, tokens)
        assert sample.documents >= 1
        assert sample.tokens <= tokens or sample.documents == 1
        assert sample.tokens == sum(len(sample.document(i)) for i in range(sample.documents))
    assert sample.bytes == held_out.bytes
    assert sample.tokens == held_out.tokens


def test_without_held_out_documents_nothing_is_validated(tmp_path, store):
    run = Run.create(config(store, steps=2, validation={"every": 1}), tmp_path / "run")
    nothing = types.SimpleNamespace(measure="bits_per_byte", held_out=0)
    assert not Validation(run.config.validation, nothing, run.world).due(1)
    assert run.trainer.validation.due(1)


def test_a_validated_run_resumes_bit_for_bit(store, tmp_path):
    options = config(store, steps=12, checkpoint_steps=6, keep_checkpoints=9, validation={"every": 3})
    Run.create(options, tmp_path / "whole").trainer.train()
    Run.create(options, tmp_path / "run").trainer.train()
    for step in (9, 12):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "config.json").unlink()
    Run.reopen(tmp_path / "run").trainer.train()
    ours, theirs = (tmp_path / name / "checkpoints" / "step-00000012" for name in ("run", "whole"))
    assert_same_bits(ours, theirs)
    assert validated(tmp_path / "run") == validated(tmp_path / "whole")


@pytest.mark.parametrize(("minutes", "all_of_them"), [(1e-9, False), (60.0, True)])
def test_the_final_evaluation_has_a_budget_of_time(store, tmp_path, minutes, all_of_them):
    run = Run.create(config(store, steps=2, evaluation_minutes=minutes), tmp_path / "run")
    held_out = run.material.store.split("held_out")
    summary = train_to_the_end(run, silent)
    assert summary["documents"] == (held_out.documents if all_of_them else 1)
    measured = bits_per_byte(hub.load(tmp_path / "run"), run.material.evaluated, window=32)
    assert summary["bits_per_byte"] == pytest.approx(measured, rel=1e-6)
