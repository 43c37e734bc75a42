"""How long a run is, and where it is in its data when it goes on."""

from __future__ import annotations

import pytest
import torch

from penstock.core.config import apply_overrides, build, read_toml
from penstock.core.errors import ConfigError
from penstock.train import presets
from penstock.train.config import TrainConfig
from penstock.train.length import updates
from penstock.train.run import Run
from tiny_runs import config


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1280}, 10),
        ({"tokens": 1281}, 11),
        ({"epochs": 2}, 50),  # 100 samples of 32 tokens, 4 a batch
        ({"epochs": 0.001}, 1),
        ({"epochs": 1, "tokens": 1280, "steps": 9}, 9),
        ({"epochs": 1, "minutes": 3}, 25),
        ({"minutes": 3}, None),
    ],
)
def test_a_run_is_as_long_as_its_configuration_says(store, lengths, wanted):
    assert updates(config(store, **{"steps": None, **lengths}), samples=100) == wanted


def test_a_run_of_an_epoch_reads_every_window(store, tmp_path):
    run = Run.create(config(store, steps=None, epochs=1), tmp_path / "run")
    samples = (run.material.store.split("train").tokens - 1) // 32
    assert run.trainer.train()
    assert run.trainer.position.step == -(-samples // 4)
    assert samples <= run.trainer.position.samples < samples + 4


def test_a_run_without_an_end_is_refused(store):
    with pytest.raises(ConfigError, match="steps, tokens, epochs or minutes"):
        config(store, steps=None)


def test_a_warmup_that_never_ends_is_told(store, tmp_path):
    schedule = {"name": "linear", "warmup_steps": 100}
    run = Run.create(config(store, steps=60, schedule=schedule), tmp_path / "run")
    (note,) = run.notes
    assert "the warm-up of 100 updates does not end in this run of 60: the highest learning rate is 0.594 " in note
    assert Run.create(config(store, steps=200, schedule=schedule), tmp_path / "other").notes == []


@pytest.mark.parametrize("branching", [False, True])
def test_a_run_goes_on_after_as_many_tokens_with_another_length(store, tmp_path, branching):
    """And says that the order is another; the same length goes on silently, at the same window."""
    Run.create(config(store, steps=10), tmp_path / "run").trainer.train()
    change = ["batch.stages=[{length=16}]"]
    found = tmp_path / "run" / "checkpoints" / "step-00000010"
    if branching:
        again = Run.branch(found, tmp_path / "branch", overrides=change)
    else:
        assert Run.reopen(tmp_path / "run").trainer.position.samples == 40
        assert Run.reopen(tmp_path / "run").notes == []
        again = Run.reopen(tmp_path / "run", overrides=change)
    assert again.trainer.position.samples == 80
    assert again.trainer.position.samples * 16 == 40 * 32 == again.trainer.position.tokens
    (note,) = again.notes
    assert "sequences of 16, not 32" in note
    assert "goes on after 1,280 tokens" in note
    expected = again.trainer.loader.batch(80, 8).tokens
    assert torch.equal(next(again.trainer.loader.prefetch(80, 8, steps=1)).tokens, expected)


def test_another_seed_is_told(store, tmp_path):
    Run.create(config(store, steps=10), tmp_path / "run").trainer.train()
    assert "seed 7, not 0" in Run.reopen(tmp_path / "run", overrides=["seed=7"]).notes[0]


def test_the_minutes_of_a_preset_and_the_clipping_can_be_unset():
    tree = apply_overrides(read_toml(presets.path_of("demo")), ["minutes=none", "clip=none", "steps=9"])
    chosen = build(TrainConfig, tree)
    assert (chosen.minutes, chosen.clip, chosen.steps) == (None, None, 9)
