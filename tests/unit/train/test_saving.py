"""Which checkpoints stay, and checkpoints that are written beside a run: of one moment, however slow the disk."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from penstock.core.errors import CheckpointError, PenstockError
from penstock.core.progress import silent
from penstock.train import checkpoint
from penstock.train.checkpoint import Keeping
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_runs import assert_same_bits, config


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(run / "checkpoints")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpoints_in_the_background_have_the_bits_of_their_moment(store, tmp_path, monkeypatch, precision):
    """Though each is written late and slowly, while the weights move on."""
    options = {"steps": 20, "checkpoint_steps": 5, "keep_checkpoints": 9, "average": "ema", "precision": precision}
    Run.create(config(store, **options), tmp_path / "plain").trainer.train()
    under_way, passed = threading.Event(), []
    save = checkpoint.save

    def slow(folder, step, *arguments, **options):
        assert threading.current_thread() is not threading.main_thread()
        until = time.monotonic() + 30
        # Not before the run has gone on, except for the last one, which nothing follows.
        while step < 20 and trainer.position.step < step + 3 and time.monotonic() < until:
            under_way.wait(0.001)
        passed.append(trainer.position.step - step)
        return save(folder, step, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    run = Run.create(config(store, checkpoint_background=True, **options), tmp_path / "run")
    trainer = run.trainer
    assert trainer.train()
    assert steps(tmp_path / "run") == steps(tmp_path / "plain") == [5, 10, 15, 20]
    assert min(passed[:-1]) >= 3
    for step in (5, 10, 15, 20):
        one, other = (tmp_path / name / "checkpoints" / f"step-{step:08d}" for name in ("run", "plain"))
        checkpoint.verify(one)
        assert_same_bits(one, other)


def test_a_run_goes_on_from_a_checkpoint_of_the_background(store, tmp_path):
    options = {"checkpoint_background": True, "checkpoint_steps": 10}
    Run.create(config(store, **options), tmp_path / "whole").trainer.train()
    run = Run.create(config(store, **options), tmp_path / "run")
    assert train_to_the_end(run, silent)
    for path in (tmp_path / "run" / "checkpoints" / "step-00000040").glob("config.json"):
        path.unlink()
    Run.reopen(tmp_path / "run").trainer.train()
    ours, theirs = (tmp_path / name / "checkpoints" / "step-00000040" for name in ("run", "whole"))
    assert_same_bits(ours, theirs)


def test_a_background_checkpoint_that_fails_ends_the_run(store, tmp_path, monkeypatch):
    def full(*_, **__):
        raise PenstockError("cannot write it: No space left on device")

    run = Run.create(config(store, checkpoint_background=True, checkpoint_steps=10), tmp_path / "run")
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(CheckpointError, match=r"saved at step 10: .*No space left.*\nThose before it are intact"):
        run.trainer.train()
    assert run.trainer.position.step == 20


@pytest.mark.parametrize(
    ("keeping", "kept"),
    [
        (Keeping(1), [60]),
        (Keeping(2), [50, 60]),
        (Keeping(1, every=20), [20, 40, 60]),
        (Keeping(1, every=25), [50, 60]),
        (Keeping(2, best=10), [10, 50, 60]),
        (Keeping(1, every=30, best=20), [20, 30, 60]),
    ],
)
def test_the_newest_every_nth_and_the_best_are_kept(keeping, kept):
    assert sorted(keeping.kept([10, 20, 30, 40, 50, 60])) == kept


def test_every_nth_checkpoint_of_a_run_is_kept(store, tmp_path):
    options = config(store, steps=50, keep_checkpoints=1, keep_every=20)
    Run.create(options, tmp_path / "run").trainer.train()
    assert steps(tmp_path / "run") == [20, 40, 50]
    for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints"):
        checkpoint.verify(path)
