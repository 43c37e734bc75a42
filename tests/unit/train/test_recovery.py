"""Stages that are lost, made anew from what the others hold."""

from __future__ import annotations

import pytest
import torch

from penstock.models.decoder import Decoder
from penstock.pipeline.run.stages import Part, Stage
from penstock.policy import create
from penstock.testing.pipeline_runtime import untied
from penstock.train.pipeline import recovery
from penstock.train.pipeline.recovery import Left, Recovered

LAYERS, STAGES = 12, 6
ROUTE = create("pipeline.route", "checkfree")
SHAPE = untied(LAYERS)


def leave_all_but(lost, folder, norms=None):
    """Parts of one Decoder, as a pipeline of six devices holds them on this route."""
    whole = Decoder(SHAPE).initialize(0)
    ranges = [range(2 * stage, 2 * stage + 2) for stage in range(STAGES)]
    for stage in (stage for stage in range(STAGES) if stage not in lost):
        part = Part(SHAPE, [Stage(ranges[stage], stage < 2, stage >= STAGES - 2)]).take(whole)
        left = Left(
            stages=tuple((own.start, own.stop) for own in ranges),
            stage=stage,
            norm=(norms or {}).get(stage, 1.0),
            position={"step": 7 + (stage == 5)},
            description={"version": "1"},
        )
        weights = dict(part.named_parameters())
        state = {f"{name}/exp_avg": torch.ones_like(p) for name, p in weights.items()}
        averages = {name: p.detach().clone() for name, p in weights.items()}
        recovery.leave(folder, stage, left, {"model": weights, "optimizer": state, "average": averages})
    return dict(whole.named_parameters())


def test_nothing_lost_is_nothing_changed(tmp_path):
    named = leave_all_but([], tmp_path)
    made = recovery.recover(tmp_path, ROUTE, SHAPE)
    assert isinstance(made, Recovered)
    assert made.position == {"step": 7}
    assert made.weights.keys() == named.keys()
    assert all(torch.equal(made.weights[name], named[name]) for name in named)


@pytest.mark.parametrize(("lost", "twin"), [(0, 1), (1, 0), (4, 5), (5, 4)])
def test_the_ends_are_copies_of_what_they_swap_with(tmp_path, lost, twin):
    named = leave_all_but([lost], tmp_path)
    made = recovery.recover(tmp_path, ROUTE, SHAPE)
    assert isinstance(made, Recovered)
    assert made.note.endswith(f"stage {lost} anew from {twin}")
    for name, tensor in made.weights.items():
        source = name
        for place in range(2):
            source = source.replace(f"layers.{2 * lost + place}.", f"layers.{2 * twin + place}.")
        assert torch.equal(tensor, named[source]), name
        assert (f"{name}/exp_avg" in made.groups["optimizer"]) is (source == name)
    assert made.groups["average"].keys() == named.keys()


def test_a_stage_between_is_the_average_of_its_neighbours_by_their_gradients(tmp_path):
    named = leave_all_but([2], tmp_path, norms={1: 3.0, 3: 1.0})
    made = recovery.recover(tmp_path, ROUTE, SHAPE)
    assert isinstance(made, Recovered)
    for name, tensor in made.weights.items():
        expected = named[name]
        for place in range(2):
            if name.startswith(f"layers.{4 + place}."):
                inner = name.split(".", 2)[2]
                expected = 0.75 * named[f"layers.{2 + place}.{inner}"] + 0.25 * named[f"layers.{6 + place}.{inner}"]
        torch.testing.assert_close(tensor, expected, msg=name)


def test_equal_neighbours_are_reproduced(tmp_path):
    """Even where no gradient is known."""
    leave_all_but([3], tmp_path, norms=dict.fromkeys(range(6), 0.0))
    made = recovery.recover(tmp_path, ROUTE, SHAPE)
    assert isinstance(made, Recovered)
    names = [name for name in made.weights if name.startswith("layers.6.") and name.endswith("norm.weight")]
    assert names
    assert all(torch.equal(made.weights[name], torch.ones_like(made.weights[name])) for name in names)


def test_what_cannot_be_made_anew_is_told(tmp_path):
    leave_all_but([2, 3], tmp_path)
    assert "stage 2 was lost with its process, and stage 3" in str(recovery.recover(tmp_path, ROUTE, SHAPE))
    recovery.forget(tmp_path)
    assert recovery.recover(tmp_path, ROUTE, SHAPE) is None
    leave_all_but([0, 1], tmp_path)
    assert "stage 0 was lost with its process, and stage 1" in str(recovery.recover(tmp_path, ROUTE, SHAPE))


def test_a_damaged_file_counts_as_lost(tmp_path):
    leave_all_but([], tmp_path)
    path = tmp_path / recovery.FOLDER / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    made = recovery.recover(tmp_path, ROUTE, SHAPE)
    assert isinstance(made, Recovered)
    assert made.note.endswith("stage 0 anew from 1")
