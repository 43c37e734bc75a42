"""Training with layers that several processes compute together: the run of one process, and whoever goes on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # the first optimizer would import it, in each of the processes
from torch.distributed.tensor import DTensor

from penstock.core.errors import ConfigError, UsageError
from penstock.core.metrics import read_metrics
from penstock.models import hub
from penstock.models.companions import copy_companions
from penstock.models.decoder import Decoder
from penstock.parallel.world import World
from penstock.testing.ranks import agreed
from penstock.train import checkpoint
from penstock.train.resuming import groups_of
from penstock.train.run import Run
from tiny_chats import chat_config, make_chat_model, turns, write_lines
from tiny_runs import MODEL, VOCABULARY, config, make_store, tensors
from torchrun_runs import check_command_line

BATCH = {"tokens": 256, "micro_tokens": 32, "stages": [{"length": 16}, {"length": 32}]}
SHAPE = {**MODEL, "heads": 4, "kv_heads": 2, "head_dim": 8, "qk_norm": True, "tied": True, "init_std": 0.08}
STEPS = 4
HEAD = {
    "model": None,
    "target": "x",
    "head": {"name": "early_exit", "layers": 1},
    "objective": "self_distillation",
    "average": None,
    "validation": {},
    "parallel": {"tensor": 2},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def options(store: Path, **changes: Any):
    """A run that keeps, measures and writes all that it can. Where a gradient is next to nothing, AdamW's eps keeps it
    from being divided by as much: the order in which it was summed would show."""
    tree = {
        "model": {**SHAPE, "vocabulary": VOCABULARY},
        "batch": BATCH,
        "optim": {"name": "adamw", "lr": 3e-3, "eps": 1e-5},
        "steps": STEPS,
        "checkpoint_steps": 2,
        "average": "ema",
        "validation": {"every": 2, "tokens": 500},
        "checkpoint_background": True,
        "evaluation_minutes": 0.5,
    }
    return config(store, **{**tree, **changes})


def trained(store: Path, folder: Path, size: int, **parallel: Any) -> list[Any]:
    """In each process, how many numbers of the weights it holds, of a run to its end."""

    def work(world: World) -> int:
        torch.set_num_threads(1)
        run = Run.create(options(store, parallel=parallel), folder, world)
        assert run.trainer.train()
        run.finish()
        masters = run.trainer.weights.masters.values()
        return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in masters)

    return agreed(size, work) if size > 1 else [work(World())]


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    trained(store, folder, 1)
    return folder


@pytest.fixture(scope="module")
def two(store, tmp_path_factory) -> tuple[Path, list[int]]:
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, trained(store, folder, 2, tensor=2)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Losses, norms and validations, and all that is left in the end."""
    for found, wanted in zip(read_metrics(ours / "metrics.jsonl"), read_metrics(theirs / "metrics.jsonl"), strict=True):
        assert found.keys() == wanted.keys()
        for key in wanted.keys() & {"loss", "grad_norm", "grad_l1", "lr_factor", "length", "validation_bits_per_byte"}:
            assert found[key] == pytest.approx(wanted[key], rel=1e-6), key
    found, wanted = (json.loads((run / "summary.json").read_text()) for run in (ours, theirs))
    assert found["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-6)
    for key in ("steps", "best_step", "documents", "parameters", "tokens"):
        assert found[key] == wanted[key]
    for part in (f"checkpoints/step-{STEPS:08}", "model"):
        one, other = tensors(ours / part), tensors(theirs / part)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)


def test_divided_layers_make_the_run_of_one(alone, two):
    """Through stages, accumulation, clipping and averages; each process has its part of the weights, and of norms
    between them all."""
    folder, held = two
    assert_same_run(folder, alone)
    parameters = json.loads((folder / "summary.json").read_text())["parameters"]
    assert max(held) < 0.52 * parameters
    assert sum(held) >= parameters


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tensor": 2, "shard": 2}, {"tensor": 2, "shard": "all"}, {"tensor": 2}])
def test_groups_share_a_batch(store, alone, tmp_path, parallel):
    """Two pairs, which hold the model together, or each."""
    held = trained(store, tmp_path / "run", 4, **parallel)
    assert_same_run(tmp_path / "run", alone)
    parameters = json.loads((alone / "summary.json").read_text())["parameters"]
    assert max(held) < (0.27 if "shard" in parallel else 0.52) * parameters


@pytest.mark.parametrize(
    ("size", "division"),
    [(1, ["parallel.tensor=1"]), (2, ["parallel.tensor=1", "parallel.shard=2"]), (2, [])],
)
def test_any_division_goes_on_with_a_checkpoint(two, alone, tmp_path, size, division):
    """All of its state is there again, bit for bit, and goes on as the run of one does."""
    folder, last = shutil.copytree(two[0], tmp_path / "run"), f"step-{STEPS:08}"
    ahead = shutil.copytree(alone, tmp_path / "alone")
    assert Run.reopen(ahead, None, ["steps=5"]).trainer.train()

    def work(world: World) -> list[str]:
        torch.set_num_threads(1)
        run = Run.reopen(folder, world, ["steps=5", *division])
        updater, stored = run.trainer.updater, checkpoint.load_state(folder / "checkpoints" / last)
        here: dict[str, Any] = {"weights": dict(updater.weights.masters), **groups_of(updater)}
        weights = dict(hub.load(two[0] / "checkpoints" / last).named_parameters())
        there: dict[str, Any] = {"weights": weights, **stored.tensors}
        assert here.keys() == there.keys()
        shards, different = run.trainer.shards, []
        for group, named in there.items():
            assert named.keys() == here[group].keys()
            for name in sorted(named):
                ours = here[group][name]
                found = shards.whole(name.split("/")[0], ours) if shards else ours
                different += [] if torch.equal(found, named[name]) else [f"{group} {name}"]
        assert run.trainer.train()
        return different

    assert (agreed(size, work) if size > 1 else [work(World())]) == [[]] * size
    one, other = (tensors(run / "checkpoints" / "step-00000005") for run in (folder, ahead))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_run_of_one_goes_on_divided(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    ahead = shutil.copytree(alone, tmp_path / "alone")
    assert Run.reopen(ahead, None, ["steps=6"]).trainer.train()

    def work(world: World) -> bool:
        torch.set_num_threads(1)
        return Run.reopen(folder, world, ["steps=6", "parallel.tensor=2"]).trainer.train()

    assert agreed(2, work) == [True, True]
    one, other = (tensors(run / "checkpoints" / "step-00000006") for run in (folder, ahead))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)


def chat_model(folder: Path) -> Path:
    """A model with a chat template, whose heads two can divide."""
    source = make_chat_model(folder / "source")
    shape = hub.read_config(source).model_copy(update={"kv_heads": 2, "heads": 2})
    hub.save(Decoder(shape).initialize(0), folder / "base")
    copy_companions(source, folder / "base")
    return folder / "base"


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "precision"), [("dpo", "fp32"), ("reward", "autocast"), ("sft", "bf16")])
def test_fine_tuning_with_divided_layers(tmp_path, objective, precision):
    """With what is computed before the run, a new head, and examples held out."""
    base, talks = chat_model(tmp_path), [turns(f"what is {i}", f"{i} a word") for i in range(24)]
    key, records = "chats", [{"messages": talk} for talk in talks]
    if objective != "sft":
        key, rejected = "preferences", [turns(f"what is {i}", "no") for i in range(24)]
        records = [{"chosen": one, "rejected": other} for one, other in zip(talks, rejected, strict=True)]
    data = {"held_out": 0.25, key: str(write_lines(tmp_path / "data.jsonl", records))}
    changes = {"data": data, "objective": objective, "steps": 4, "optim": {"name": "adamw", "lr": 1e-3}}
    alone = Run.create(chat_config(base, precision=precision, **changes), tmp_path / "alone")
    divided = chat_config(base, precision=precision, parallel={"tensor": 2}, **changes)
    assert alone.trainer.train()
    summary = alone.finish()

    def work(world: World) -> float:
        torch.set_num_threads(1)
        run = Run.create(divided, tmp_path / "run", world)
        assert run.trainer.train()
        return run.finish()["held_out_loss"]

    near = 1e-5 if precision == "fp32" else 1e-2
    assert agreed(2, work) == [pytest.approx(summary["held_out_loss"], rel=near)] * 2
    losses = [
        [each["loss"] for each in read_metrics(run / "metrics.jsonl")] for run in (tmp_path / "run", alone.folder)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=near)
    assert hub.dtype_of(tmp_path / "run" / "model") == hub.dtype_of(alone.folder / "model")


@pytest.mark.slow
def test_the_command_line_with_divided_layers(store, tmp_path):
    """torchrun starts two, which compile their layers; three, which make no pairs; and one goes on alone."""
    batch, model = {**BATCH, "stages": [{"length": 32}]}, {**SHAPE, "vocabulary": VOCABULARY}
    check_command_line(tmp_path, store, "parallel.tensor=2", "parallel.tensor=1", batch=batch, model=model)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parallel": {"tensor": 2, "pipeline": 2}}, "give parallel.pipeline or parallel.tensor, not both"),
        ({"optim": "muon", "parallel": {"tensor": 2}}, "the optimizer muon needs whole matrices"),
        ({"average": "naswa", "parallel": {"tensor": 2}}, "the average naswa looks at all weights together"),
        ({"model": None, "start_from": "x", "tuner": "lora", "parallel": {"tensor": 2}}, "the tuner lora adds to"),
        (HEAD, "beside a whole model"),
    ],
)
def test_what_needs_whole_matrices_is_refused(store, changes, told):
    with pytest.raises(ConfigError, match=told):
        options(store, **changes)


@pytest.mark.parametrize(
    ("model", "told", "hint"),
    [
        ({"moe": {"experts": 4, "ffn": 8}}, "it has experts", "Leave parallel.tensor out."),
        ({"heads": 6}, "it has 2 heads of keys and values", "Set parallel.tensor to 2."),
        ({}, "this is one process, and 2 are to compute each layer together", "Start 2 processes"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_before_the_run(store, tmp_path, model, told, hint):
    shape, tensor = {**SHAPE, "vocabulary": VOCABULARY, **model}, 3 if "heads" in model else 2
    with pytest.raises(UsageError, match=told) as refusal:
        Run.create(options(store, model=shape, parallel={"tensor": tensor}), tmp_path / "run")
    assert refusal.value.hint is not None
    assert refusal.value.hint.startswith(hint)
    assert not (tmp_path / "run").exists()
