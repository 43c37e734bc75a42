"""Training on a pipeline: the run of one process, its checkpoints, its profile, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import forked_ranks
from penstock.core.files import read_json
from penstock.core.metrics import read_metrics
from penstock.models import hub
from penstock.parallel.world import World
from penstock.testing.ranks import ranks
from penstock.train import checkpoint
from penstock.train.run import Run
from tiny_runs import MODEL, VOCABULARY, config, make_store, tensors

#: Loss curves in fp32 with sums in another order: what differs is rounding, amplified over the updates.
TOLERANCE = 1e-5
BATCH = {"tokens": 192, "micro_tokens": 32, "stages": [{"length": 16}, {"length": 32}]}
SHAPE = {**MODEL, "layers": 4, "vocabulary": VOCABULARY, "init_std": 0.08, "tied": True}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def options(store: Path, **changes: Any):
    return config(store, **{"model": SHAPE, "batch": BATCH, "steps": 12, "average": "ema", **changes})


def pipelined(store: Path, devices: int, schedule: Any, **changes: Any):
    return options(store, parallel={"pipeline": devices}, pipeline={"schedule": schedule}, **changes)


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory) -> Run:
    run = Run.create(options(store), tmp_path_factory.mktemp("alone") / "run")
    assert run.trainer.train()
    run.finish()
    return run


def trained(options, folder: Path, size: int) -> None:
    results = ranks(size, forked_ranks.trained(options, folder, None))
    assert [result.get("raised") for result in results] == [None] * size
    assert all(result["returned"][0] for result in results)
    assert len({result["returned"][2] for result in results}) == 1


def resumed(folder: Path, size: int, *overrides: str) -> None:
    """Goes on with the run in ``folder`` with another layout."""

    def work(world: World) -> bool:
        return Run.reopen(folder, world, overrides).trainer.train()

    results = ranks(size, work)
    assert [result.get("returned") for result in results] == [True] * size, results


def assert_same_curve(folder: Path, alone: Run) -> None:
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (folder, alone.folder))
    assert [record["step"] for record in ours] == list(range(1, 13))
    for key in ("loss", "grad_norm", "grad_l1", "lr_factor", "length"):
        assert [record[key] for record in ours] == pytest.approx([record[key] for record in theirs], rel=TOLERANCE)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.3


@pytest.mark.parametrize(
    ("devices", "size", "schedule", "changes"),
    [
        (4, 4, "zb-h1", {}),
        (2, 2, "chimera", {}),
        (2, 2, "v_half", {}),
        (2, 4, "1f1b", {"activation_checkpointing": True}),
    ],
)
def test_a_pipeline_makes_the_run_of_one_process(store, alone, tmp_path, devices, size, schedule, changes):
    """The same curve, model, averages and evaluation, also where two pipelines share each batch."""
    trained(pipelined(store, devices, schedule, **changes), tmp_path / "run", size)
    assert_same_curve(tmp_path / "run", alone)
    one, other = (tensors(path / "checkpoints" / "step-00000012") for path in (tmp_path / "run", alone.folder))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        if name.startswith(("model/", "average/")):
            torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=2e-3, msg=name)
    summaries = [read_json(path / "summary.json") for path in (tmp_path / "run", alone.folder)]
    assert summaries[0]["parameters"] == summaries[1]["parameters"]
    assert summaries[0]["bits_per_byte"] == pytest.approx(summaries[1]["bits_per_byte"], rel=TOLERANCE)


def test_a_checkpoint_does_not_depend_on_the_layout(store, alone, tmp_path):
    """Four stages, then two, then one process, four updates each: one loss curve."""
    folder = tmp_path / "run"
    trained(pipelined(store, 4, "zb-h1", checkpoint_steps=4, keep_checkpoints=3), folder, 4)
    for step, devices in ((4, 2), (8, 1)):
        for found in checkpoint.checkpoints(folder / "checkpoints"):
            if checkpoint.step_of(found) > step:
                shutil.rmtree(found)
        transforms = "pipeline.transforms=[2bp, pipeoffload]"
        resumed(folder, devices, f"parallel.pipeline={devices}", "pipeline.schedule=1f1b", transforms)
        assert_same_curve(folder, alone)
    assert read_json(folder / "run.json")["parallel"] == {"pipeline": 1}


def test_the_profile_of_the_first_updates(store, tmp_path):
    """Costs of every stage, and the timeline, measured and simulated, in the run folder."""
    trained(pipelined(store, 2, "zb_h1", steps=4, average=None), tmp_path / "run", 2)
    profile = read_json(tmp_path / "run" / "pipeline.json")
    assert (profile["devices"], profile["microbatches"], profile["layers"]) == (2, 6, [[0, 3], [3, 4]])
    for kind in ("forward", "input_grad", "weight_grad"):
        assert len(profile["seconds"][kind]) == 2
        assert all(seconds > 0 for seconds in profile["seconds"][kind])
    assert all(size > 32 * 32 * 4 for size in profile["activation_bytes"])
    assert profile["message_bytes"] == 32 * 32 * 4
    events = read_json(tmp_path / "run" / "pipeline-trace.json")["traceEvents"]
    drawn = [(event["pid"], event["name"]) for event in events if event["ph"] == "X"]
    assert len(drawn) == 2 * 2 * 6 * 3
    ends = [max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] == pid) for pid in (0, 1)]
    assert ends == pytest.approx([1e6 * profile["makespan"][which] for which in ("measured", "simulated")])
    assert {"0F0", "1I5", "0W5"} <= {name for _, name in drawn}


def test_a_schedule_is_planned_from_the_first_updates(store, alone, tmp_path):
    """zb_auto begins at equal times, and goes on with the measured ones: all processes the same, on the same curve,
    within the memory that it may use."""
    trained(pipelined(store, 2, {"name": "zb_auto", "memory": 1}), tmp_path / "run", 2)
    assert_same_curve(tmp_path / "run", alone)
    profile = read_json(tmp_path / "run" / "pipeline.json")
    times = profile["schedule"]["times"]
    for kind in ("forward", "input_grad", "weight_grad"):
        assert len(times[kind]) == 2
        assert all(seconds > 0 for seconds in times[kind])
        assert times[kind] != profile["seconds"][kind]  # those of a later update
    assert times["transfer"] >= 0
    events = read_json(tmp_path / "run" / "pipeline-trace.json")["traceEvents"]
    assert max(event["args"]["held"] for event in events if event["ph"] == "C") <= max(profile["activation_bytes"])
    assert "zb_auto, measured" in {event["args"].get("name") for event in events if event["ph"] == "M"}


def test_from_a_model_in_bf16_with_experts(store, tmp_path):
    """Sparse layers, masters apart from the weights, untied head; it starts from a folder."""
    moe = {"experts": 3, "ffn": 16, "router": {"name": "softmax", "top_k": 2}}
    shape = {**SHAPE, "tied": False, "moe": moe, "layers": 3}
    started = {"model": shape, "steps": 3, "average": None, "precision": "bf16"}
    trained(options(store, **started), tmp_path / "one", 1)
    trained(pipelined(store, 3, "zb_h1", **started), tmp_path / "three", 3)
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("three", "one"))
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=5e-3)
    again = options(
        store,
        model=None,
        start_from=str(tmp_path / "one" / "model"),
        steps=2,
        average=None,
        parallel={"pipeline": 2},
        pipeline={"schedule": "gpipe"},
    )
    trained(again, tmp_path / "again", 2)
    first = read_metrics(tmp_path / "again" / "metrics.jsonl")[0]["loss"]
    assert first == pytest.approx(ours[-1]["loss"], abs=0.5)
    hub.load(tmp_path / "again" / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {**BATCH, "micro_tokens": None}}, "batch.micro_tokens is not set"),
        ({"average": "naswa"}, "'naswa' looks at all weights together"),
        ({"pipeline": {"schedule": "pipedream"}}, "pipedream updates weights after each microbatch"),
        ({"activation_checkpointing": True}, "zb_h1 defers weight gradients"),
        ({"parallel": {"pipeline": 3}}, "1 processes do not make whole pipelines of 3"),
        ({"model": {**SHAPE, "layers": 1}}, "1 layers cannot be cut into 2 stages"),
    ],
)
def test_refusals(store, tmp_path, changes, message):
    """Before anything is written."""
    everything = {"parallel": {"pipeline": 2}, "pipeline": {"schedule": "zb-h1"}, **changes}

    def work(world: World) -> None:
        Run.create(options(store, **everything), tmp_path / "run", world)

    size = 1 if changes.get("parallel") else 2
    for result in ranks(size, work):
        assert message in result["raised"][1], json.dumps(result)
    assert not (tmp_path / "run").exists()
