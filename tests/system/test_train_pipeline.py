"""Training on a pipeline: the run of one process, its checkpoints, its profile, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import forked_ranks
from penstock.cli import build_app
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
#: Enough that a schedule that is planned from the first updates runs for some more.
STEPS = 8
LAST = f"step-{STEPS:08}"
BATCH = {"tokens": 192, "micro_tokens": 32, "stages": [{"length": 16}, {"length": 32}]}
SHAPE = {**MODEL, "layers": 4, "vocabulary": VOCABULARY, "init_std": 0.08, "tied": True}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def options(store: Path, **changes: Any):
    return config(store, **{"model": SHAPE, "batch": BATCH, "steps": STEPS, "average": "ema", **changes})


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
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "grad_l1", "lr_factor", "length"):
        assert [record[key] for record in ours] == pytest.approx([record[key] for record in theirs], rel=TOLERANCE)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.2


@pytest.mark.parametrize(
    ("devices", "size", "schedule", "changes"),
    [
        (4, 4, "zb-h1", {}),
        pytest.param(2, 2, "chimera", {}, marks=pytest.mark.slow),
        pytest.param(2, 2, "v_half", {}, marks=pytest.mark.slow),
        (2, 4, "1f1b", {"activation_checkpointing": True}),
    ],
)
def test_a_pipeline_makes_the_run_of_one_process(store, alone, tmp_path, devices, size, schedule, changes):
    """The same curve, model, averages and evaluation, also where two pipelines share each batch."""
    trained(pipelined(store, devices, schedule, **changes), tmp_path / "run", size)
    assert_same_curve(tmp_path / "run", alone)
    one, other = (tensors(path / "checkpoints" / LAST) for path in (tmp_path / "run", alone.folder))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        if name.startswith(("model/", "average/")):
            torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=2e-3, msg=name)
    summaries = [read_json(path / "summary.json") for path in (tmp_path / "run", alone.folder)]
    assert summaries[0]["parameters"] == summaries[1]["parameters"]
    assert summaries[0]["bits_per_byte"] == pytest.approx(summaries[1]["bits_per_byte"], rel=TOLERANCE)


def test_a_checkpoint_does_not_depend_on_the_layout(store, alone, tmp_path):
    """Four stages, then two, then one process, some updates each: one loss curve."""
    folder = tmp_path / "run"
    trained(pipelined(store, 4, "zb-h1", checkpoint_steps=3, keep_checkpoints=3), folder, 4)
    for step, devices in ((3, 2), (6, 1)):
        for found in checkpoint.checkpoints(folder / "checkpoints"):
            if checkpoint.step_of(found) > step:
                shutil.rmtree(found)
        transforms = "pipeline.transforms=[2bp, pipeoffload]"
        resumed(folder, devices, f"parallel.pipeline={devices}", "pipeline.schedule=1f1b", transforms)
        assert_same_curve(folder, alone)
    assert read_json(folder / "run.json")["parallel"] == {"pipeline": 1, "shard": 1, "tensor": 1}


def test_the_profile_of_the_first_updates(store, tmp_path):
    """Costs of every stage, and the timeline, measured and simulated, in the run folder."""
    trained(pipelined(store, 2, "zb_h1", steps=4, average=None), tmp_path / "run", 2)
    profile = read_json(tmp_path / "run" / "pipeline.json")
    assert (profile["devices"], profile["microbatches"], profile["layers"]) == (2, 6, [[0, 3], [3, 4]])
    for kind in ("forward", "input_grad", "weight_grad"):
        assert len(profile["times"][kind]) == 2
        assert all(seconds > 0 for seconds in profile["times"][kind])
    assert all(size > 32 * 32 * 4 for size in profile["activation_bytes"])
    assert profile["message_bytes"] == 32 * 32 * 4
    events = read_json(tmp_path / "run" / "pipeline-trace.json")["traceEvents"]
    drawn = [(event["pid"], event["name"]) for event in events if event["ph"] == "X"]
    assert len(drawn) == 2 * 2 * 6 * 3
    ends = [max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] == pid) for pid in (0, 1)]
    assert ends == pytest.approx([1e6 * profile["makespan"][which] for which in ("measured", "simulated")])
    assert {"0F0", "1I5", "0W5"} <= {name for _, name in drawn}


def test_the_costs_of_a_run_flow_back(store, tmp_path):
    """I and W are measured though the schedule has B only; search, compare and partition read what a run wrote, for
    other numbers of stages too; and a run takes the partition."""
    trained(pipelined(store, 2, "1f1b", steps=4, average=None), tmp_path / "run", 2)
    costs = tmp_path / "run" / "pipeline.json"
    times = read_json(costs)["times"]
    assert len(times["pieces"]) == 6
    for stage, pieces in enumerate((times["pieces"][:4], times["pieces"][4:])):
        for kind in ("forward", "input_grad", "weight_grad"):
            assert sum(piece[kind] for piece in pieces) == pytest.approx(times[kind][stage])
    assert times["input_grad"] != pytest.approx(times["weight_grad"])
    assert [(way["source"], way["target"]) for way in times["ways"]] == [(0, 1), (1, 0)]

    def printed(*arguments: str) -> Any:
        result = CliRunner().invoke(build_app(), ["pipeline", *arguments, "--costs", str(costs), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    numbers = ("--stages", "2", "--microbatches", "6")
    compared = {row["name"]: row for row in printed("compare", *numbers)}
    work = sum(sum(times[kind]) for kind in ("forward", "input_grad", "weight_grad"))
    for name in ("1f1b", "v_half", "interleaved_1f1b"):  # of two stages, and of four
        assert (
            6 * work / 2 <= compared[name]["makespan"] <= 6 * work + 12 * max(way["seconds"] for way in times["ways"])
        )
    searched = {row["name"] for row in printed("search", "--memory", "4", "--top", "100", *numbers)}
    assert {"zb_auto", "zb_h1", "1f1b", "v_half"} <= searched
    partition = tmp_path / "partition.json"
    found = printed("partition", "--stages", "2", "--straight", "--out", str(partition))
    assert found == read_json(partition)
    (first, second) = found["stages"]
    assert (first["first"], first["last"], second["last"]) == (0, second["first"], 6)

    cut = {"schedule": "1f1b", "partition": str(partition)}
    trained(options(store, parallel={"pipeline": 2}, pipeline=cut, steps=4, average=None), tmp_path / "cut", 2)
    edge = min(max(first["last"] - 1, 0), 4)
    assert read_json(tmp_path / "cut" / "pipeline.json")["layers"] == [[0, edge], [edge, 4]]
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("cut", "run"))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("cut", "layers"),
    [
        pytest.param({"cuts": [1]}, [[0, 1], [1, 4]], marks=pytest.mark.slow),
        ({"cuts": [0]}, [[0, 0], [0, 4]]),
        ({"speeds": [1.0, 9.0]}, [[0, 1], [1, 4]]),
        pytest.param({"speeds": [9.0, 1.0]}, [[0, 3], [3, 4]], marks=pytest.mark.slow),
    ],
)
def test_cuts_by_hand(store, alone, tmp_path, cut, layers):
    """Stages of the layers that were asked for, of none but the embedding even, on the same curve."""
    trained(options(store, parallel={"pipeline": 2}, pipeline=cut), tmp_path / "run", 2)
    assert_same_curve(tmp_path / "run", alone)
    assert read_json(tmp_path / "run" / "pipeline.json")["layers"] == layers


@pytest.mark.slow
def test_rows_of_the_vocabulary_are_one_matrix_in_checkpoints(store, alone, tmp_path):
    """Sharded over two processes, then over one that has all, then over two again: one curve, weights, averages and
    optimizer state those of a run with whole matrices."""
    folder = tmp_path / "run"
    sharded = {"transforms": [{"name": "vocabulary", "times": {"output": 2.0}}]}
    pipeline = {"parallel": {"pipeline": 2}, "pipeline": sharded}
    trained(options(store, **pipeline, checkpoint_steps=3, keep_checkpoints=3), folder, 2)
    for step, devices in ((3, 1), (6, 2)):
        for found in checkpoint.checkpoints(folder / "checkpoints"):
            if checkpoint.step_of(found) > step:
                shutil.rmtree(found)
        resumed(folder, devices, f"parallel.pipeline={devices}")
    assert_same_curve(folder, alone)
    one, other = (tensors(path / "checkpoints" / LAST) for path in (folder, alone.folder))
    assert {name: tensor.shape for name, tensor in one.items()} == {n: t.shape for n, t in other.items()}


def test_a_lost_stage_is_made_anew_without_a_checkpoint(store, tmp_path):
    """One of four processes is killed before any checkpoint: the run goes on with a copy of the stage that it swaps
    with, and all others as they were."""
    route = {"parallel": {"pipeline": 4}, "pipeline": {"route": "checkfree"}}
    chosen = options(store, **route, steps=12, checkpoint_steps=100, average="ema")
    folder = tmp_path / "run"

    def work(world: World) -> None:
        torch.set_num_threads(1)
        run = Run.create(chosen, folder, world)
        update = run.trainer.update

        def dies(*arguments: Any) -> Any:
            if world.rank == 2 and run.trainer.position.step == 5:
                os._exit(1)
            return update(*arguments)

        run.trainer.update = dies  # type: ignore[method-assign]
        run.trainer.train()

    results = ranks(4, work)
    assert ["raised" in result for result in results] == [True, True, False, True]
    left = sorted((folder / "survivors").iterdir())
    assert [path.name for path in left] == [f"rank-{rank:05}.safetensors" for rank in (0, 1, 3)]
    held = {name: tensor for path in left for name, tensor in load_file(path).items()}

    def again(world: World) -> list[Any]:
        torch.set_num_threads(1)
        run = Run.reopen(folder, world)
        weights = {name: p.detach().clone() for name, p in run.trainer.model.named_parameters()}
        copied = {name: name.replace("layers.2.", "layers.3.") for name in weights}
        same = all(torch.equal(weights[name], held[f"model/{copied[name]}"]) for name in weights)
        fresh = world.rank == 2 or bool(run.trainer.updater.optimizer.state)
        return [run.trainer.position.step, same, fresh, run.notes, run.trainer.train()]

    found = [result["returned"] for result in ranks(4, again)]
    assert [answer[:3] + answer[4:] for answer in found] == [[5, True, True, True]] * 4
    assert found[0][3] == ["goes on after 5 steps from what the processes held when one was lost: stage 2 anew from 3"]
    assert not (folder / "survivors").exists()
    losses = [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]
    assert len(losses) == 12
    assert losses[-1] < losses[4] - 0.1


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
        assert times[kind] != profile["times"][kind]  # those of a later update
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
        ({"pipeline": {"schedule": "pipedream"}}, "each stage after each microbatch, and clip needs the norm"),
        ({"pipeline": {"schedule": "pipedream"}, "clip": None}, "is on several devices"),
        ({"pipeline": {"cuts": [1, 2]}}, "do not cut 4 layers into the 2 stages"),
        ({"pipeline": {"speeds": [1.0]}}, "pipeline.speeds has 1 numbers, and a pipeline has 2 devices"),
        ({"pipeline": {"route": "checkfree"}}, "it needs four stages, not 2"),
        ({"activation_checkpointing": True}, "zb_h1 defers weight gradients"),
        ({"parallel": {"pipeline": 3}}, "this is one process, and a pipeline of 3 stages needs 3"),
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
