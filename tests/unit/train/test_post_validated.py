"""Updates that no device of a pipeline waits for: those of one device, whatever became of them at first."""

from __future__ import annotations

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.parallel.world import World
from penstock.pipeline.run.post_validation import tentative
from penstock.policy import create
from penstock.testing.pipeline_training import batch, check_config, options
from penstock.testing.ranks import agreed
from penstock.train.loop import Trainer
from penstock.train.pipeline import post_validated
from penstock.train.pipeline.pipeline import Pipeline

VALIDATED = {"post_validation": True}


def test_what_can_be_done_before_the_last_device_has_told():
    """In 1F1B the warm-up and its first forward; of a V its first leg; of a path that turns back, what lies before."""
    assert tentative(create("pipeline.schedule", "1f1b").build(4, 8)) == [4, 3, 2, 0]
    assert tentative(create("pipeline.schedule", "zb_h2").build(3, 8)) == [5, 3, 0]
    assert tentative(create("pipeline.schedule", "chimera").build(4, 4))[3] == 0
    schedule = create("pipeline.schedule", "v_half").build(4, 8)
    for order, count in zip(schedule.orders, tentative(schedule), strict=True):
        assert all(task.stage < 4 for task in order[:count])
    assert tentative(create("pipeline.schedule", "gpipe").build(1, 3)) == [0]


@pytest.mark.parametrize(
    ("size", "devices", "schedule", "clip"),
    [
        (3, 3, "zb_h2", 3.0),
        pytest.param(3, 3, "1f1b", 1e-3, marks=pytest.mark.slow),
        pytest.param(3, 3, "1f1b", None, marks=pytest.mark.slow),
        pytest.param(2, 2, "v_half", 3.0, marks=pytest.mark.slow),
        pytest.param(2, 2, "chimera", 3.0, marks=pytest.mark.slow),
        pytest.param(4, 2, "1f1b", 3.0, marks=pytest.mark.slow),
        pytest.param(4, 4, "zb_h1", 1e-3, marks=pytest.mark.slow),
    ],
)
def test_the_updates_are_those_of_one_device(tmp_path, size, devices, schedule, clip):
    """Norms of the whole gradient below and above the limit, of which some devices alone see too little."""

    def work(world: World) -> list[str]:
        torch.set_num_threads(1)
        chosen = options(devices, 2 * size, 8, {"schedule": schedule, **VALIDATED}, clip=clip)
        return check_config(chosen, world, tmp_path, updates=4)

    assert agreed(size, work) == [[]] * size


def test_the_first_forwards_are_made_again_only_where_they_saw_wrong_weights(tmp_path, monkeypatch):
    """The limit lies between two norms, so that both happen in one run."""

    def work(world: World) -> list[list[bool]]:
        torch.set_num_threads(1)
        found = []
        for clip in (1e-3, 1e6):
            kept = []
            chosen = options(2, 4, 2, {"schedule": "1f1b", **VALIDATED}, clip=clip)
            pipeline = Pipeline(chosen, chosen.model, tmp_path, world)
            pipeline.part.initialize(0).double()
            trainer = Trainer(chosen, pipeline.part, None, None, tmp_path, world, pipeline)
            settle = post_validated.PostValidated.settle

            def spied(self, settle=settle, kept=kept):
                settled = settle(self)
                kept.extend([settled.kept] if settled else [])
                return settled

            monkeypatch.setattr(post_validated.PostValidated, "settle", spied)
            for step in range(3):
                trainer.update(batch(step, 4), 8, 1.0)
            trainer.updater.settle()
            monkeypatch.setattr(post_validated.PostValidated, "settle", settle)
            found.append(kept)
        return found

    assert agreed(2, work) == [[[False] * 3, [True] * 3]] * 2


def test_a_gradient_that_is_not_finite_updates_nothing(tmp_path):
    """It comes from the last device, after the first one has taken its step."""

    def work(world: World) -> bool:
        torch.set_num_threads(1)
        chosen = options(2, 4, 2, {"schedule": "1f1b", **VALIDATED}, model={"tied": False})
        pipeline = Pipeline(chosen, chosen.model, tmp_path, world)
        pipeline.part.initialize(0).double()
        trainer = Trainer(chosen, pipeline.part, None, None, tmp_path, world, pipeline)
        before = {name: m.detach().clone() for name, m in trainer.weights.masters.items()}
        if world.rank == 1:
            pipeline.part.head.weight.register_hook(lambda gradient: gradient * float("nan"))
        measured = trainer.update(batch(0, 4), 8, 1.0)
        trainer.updater.settle()
        assert not measured["grad_norm"].isfinite()
        return all(torch.equal(m.detach(), before[name]) for name, m in trainer.weights.masters.items())

    assert agreed(2, work) == [True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_bad_update": "skip"}, "on_bad_update looks at the whole gradient first.*\n.*Set on_bad_update=stop"),
        ({"minutes": 1.0}, "minutes asks the leading process"),
        (
            {"model": {"qk_norm": False, "moe": {"experts": 2, "ffn": 4, "router": {"name": "softmax", "top_k": 1}}}},
            "the loads of experts",
        ),
        ({"pipeline": {"schedule": "pipedream", **VALIDATED}, "clip": None}, "validates one update a batch"),
    ],
)
def test_what_makes_all_wait_is_refused(tmp_path, changes, message):
    chosen = options(2, 4, 2, changes.pop("pipeline", {"schedule": "1f1b", **VALIDATED}), **changes)
    with pytest.raises(ConfigError, match=message):
        Pipeline(chosen, chosen.model, tmp_path, World(rank=0, size=2))
