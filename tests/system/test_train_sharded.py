"""Training in shards: the run of one process, whoever holds what, and whoever goes on with it."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # the first optimizer would import it, in each of the processes
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from penstock.core.errors import ConfigError
from penstock.core.metrics import read_metrics
from penstock.models import hub
from penstock.parallel.shard import whole
from penstock.parallel.world import World
from penstock.testing.ranks import agreed, ranks
from penstock.train import checkpoint
from penstock.train.resuming import groups_of
from penstock.train.run import Run
from tiny_chats import chat_config, make_chat_model, turns, write_lines
from tiny_runs import assert_same_bits, config, make_store, tensors
from torchrun_runs import check_command_line

BATCH = {"tokens": 256, "micro_tokens": 32, "stages": [{"length": 16}, {"length": 32}]}
STEPS = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def options(store: Path, **changes: Any):
    tree = {"batch": BATCH, "steps": STEPS, "checkpoint_steps": 2, "parallel": {"shard": "all"}, **changes}
    return config(store, **tree)


@pytest.fixture(scope="module")
def everything(store) -> dict[str, Any]:
    """Options that make a run keep, measure and write all that it can."""
    validation = {"every": 2, "tokens": 500}
    return {"average": "ema", "validation": validation, "checkpoint_background": True, "evaluation_minutes": 0.5}


@pytest.fixture(scope="module")
def four(store, everything, tmp_path_factory) -> Path:
    """A run of four processes."""
    folder = tmp_path_factory.mktemp("four") / "run"

    def work(world: World) -> list[Any]:
        torch.set_num_threads(1)
        run = Run.create(options(store, **everything), folder, world)
        complete = run.trainer.train()
        held = sum(p.to_local().numel() for p in run.trainer.weights.masters.values())
        return [complete, run.finish()["bits_per_byte"], held]

    results = agreed(4, work)
    assert all(result[:2] == [True, results[0][1]] for result in results)
    assert sum(result[2] for result in results) == json.loads((folder / "summary.json").read_text())["parameters"]
    return folder


def test_shards_make_the_run_of_one(store, everything, four, tmp_path):
    """Losses, norms and validations through stages, accumulation and clipping, and all that is left in the end."""
    run = Run.create(options(store, **everything), tmp_path / "run")
    assert run.trainer.train()
    summary, theirs = run.finish(), json.loads((four / "summary.json").read_text())
    for ours, wanted in zip(
        read_metrics(four / "metrics.jsonl"), read_metrics(run.folder / "metrics.jsonl"), strict=True
    ):
        for key in wanted.keys() & {"loss", "grad_norm", "grad_l1", "lr_factor", "length", "validation_bits_per_byte"}:
            assert ours[key] == pytest.approx(wanted[key], rel=1e-5), key
    assert theirs["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-5)
    assert {key: theirs[key] for key in ("steps", "best_step", "documents")} == {
        key: summary[key] for key in ("steps", "best_step", "documents")
    }
    for part in (f"checkpoints/step-{STEPS:08}", "model"):
        one, other = tensors(four / part), tensors(run.folder / part)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_shards_leave_is_a_model_folder(four):
    """To transformers too; in files of the processes, none of which has had all of it."""
    files = sorted((four / "model").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-{part:05}-of-00004.safetensors" for part in (1, 2, 3, 4)]
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 0.4 * sum(sizes)  # the embedding is the largest, and whole
    ours = hub.load(four / "model")
    theirs = AutoModelForCausalLM.from_pretrained(four / "model", dtype=torch.float32)
    assert sum(p.numel() for p in theirs.parameters()) == ours.parameter_count()
    assert torch.equal(theirs.get_input_embeddings().weight, ours.embedding.weight)


@pytest.mark.parametrize("size", [1, 2])
def test_any_number_of_processes_goes_on_with_a_checkpoint(four, tmp_path, size):
    """All of its state is there again, bit for bit, and goes on."""
    folder = shutil.copytree(four, tmp_path / "run")

    def work(world: World) -> list[str]:
        run = Run.reopen(folder, world, ["steps=5"])
        updater, stored = run.trainer.updater, checkpoint.load_state(folder / "checkpoints" / f"step-{STEPS:08}")
        here: dict[str, Any] = {"weights": dict(updater.weights.masters), **groups_of(updater)}
        there: dict[str, Any] = {
            "weights": dict(hub.load(four / "checkpoints" / f"step-{STEPS:08}").named_parameters())
        }
        there |= stored.tensors
        assert here.keys() == there.keys()
        assert updater.position.step == STEPS
        sharded = any(isinstance(p, DTensor) for p in updater.masters)
        different = [] if sharded == (size > 1) else ["the layout"]
        for group, named in there.items():
            assert named.keys() == here[group].keys()
            different += [
                f"{group} {name}" for name in sorted(named) if not torch.equal(whole(here[group][name]), named[name])
            ]
        assert run.trainer.train()
        return different

    assert (agreed(size, work) if size > 1 else [work(World())]) == [[]] * size
    assert checkpoint.newest(folder / "checkpoints")[0].name == "step-00000005"


@pytest.mark.parametrize(
    "instant", ["own part", *(pytest.param(instant, marks=pytest.mark.slow) for instant in ("update", "leader"))]
)
def test_a_lost_process_costs_no_committed_checkpoint(store, tmp_path, monkeypatch, instant):
    """It is killed in an update, while it writes its part, or, the leading one, before the folder has its name. The
    other says who it was, and two that go on reach the bits of a run that nobody has disturbed."""
    lost = 0 if instant == "leader" else 1

    def disturb(world: World, run: Run) -> None:
        def dies(true):
            def call(*arguments: Any, **keywords: Any) -> Any:
                if run.trainer.position.step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return true(*arguments, **keywords)

            return call

        if world.rank == lost:
            owner, name = {
                "update": (run.trainer.updater, "update"),
                "own part": (hub, "save_part"),
                "leader": (checkpoint, "complete"),
            }[instant]
            monkeypatch.setattr(owner, name, dies(getattr(owner, name)))

    def work(world: World) -> bool:
        torch.set_num_threads(1)
        run = Run.create(
            options(store, checkpoint_steps=1, checkpoint_background=instant != "leader"), tmp_path / "run", world
        )
        disturb(world, run)
        return run.trainer.train()

    results = ranks(2, work)
    assert results[lost] == {}
    kind, message = results[1 - lost]["raised"]
    assert (kind, message.splitlines()[0]) == ("LossError", f"rank {lost} has ended without a word")
    found, faults = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert faults == []
    assert checkpoint.step_of(found) in ((2, 3) if instant == "update" else (2,))  # the third was under way

    def again(world: World) -> bool:
        torch.set_num_threads(1)
        straight = Run.create(options(store), tmp_path / "straight", world)
        return straight.trainer.train() and Run.reopen(tmp_path / "run", world).trainer.train()

    assert agreed(2, again) == [True, True]
    last = f"checkpoints/step-{STEPS:08}"
    assert_same_bits(tmp_path / "run" / last, tmp_path / "straight" / last)


def storages() -> dict[int, int]:
    """The bytes of every piece of memory that a tensor of this process has, by its address."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    local = [each.to_local() if isinstance(each, DTensor) else each for each in found]
    memory = [each.untyped_storage() for each in local if each.device.type == "cpu"]
    return {each.data_ptr(): each.nbytes() for each in memory}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_process_holds_its_part_of_everything(store, tmp_path, size):
    """Parameters, gradients and both moments, in fp32: counted in what tensors there are, whoever made them."""
    model = {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 256, "vocabulary": 320}

    def work(world: World) -> list[int]:
        torch.set_num_threads(1)
        before = storages()
        run = Run.create(options(store, model={**model, "context": 64}), tmp_path / "run", world)
        updater, batch = run.trainer.updater, run.trainer.loader.batch(0, run.trainer.rows)
        updater.update(batch, 32, 1.0)
        total, _ = updater.gradients(batch, 32, torch.ones(()))
        assert math.isfinite(total.item())
        held = sum(size for place, size in storages().items() if place not in before)
        return [run.trainer.parameters, held]

    results = agreed(size, work)
    whole_bytes = 4 * 4 * results[0][0]
    for _, held in results:
        assert whole_bytes / size <= held <= 1.1 * whole_bytes / size


def test_a_bad_gradient_of_one_process_is_skipped_by_all(store, tmp_path):
    def work(world: World) -> list[Any]:
        torch.set_num_threads(1)
        run = Run.create(options(store, on_bad_update="skip", steps=3), tmp_path / "run", world)
        updater, loss, before = run.trainer.updater, run.trainer.updater.loss, 0.0
        seen = []
        for step in range(3):
            spoilt = step == 1 and world.rank == 1
            updater.loss = (lambda *given: loss(*given) * math.inf) if spoilt else loss  # type: ignore[assignment]
            measured = updater.update(run.trainer.loader.batch(0, run.trainer.rows), 32, 1.0)
            after = sum(whole(master).double().abs().sum().item() for master in updater.masters)
            seen.append(["skipped" in measured, after != before])
            before = after
        return seen

    assert agreed(2, work) == [[[False, True], [True, False], [False, True]]] * 2


@pytest.mark.parametrize(
    ("objective", "tuner", "precision"),
    [
        ("dpo", "full", "fp32"),
        pytest.param("reward", "lora", "fp32", marks=pytest.mark.slow),
        pytest.param("sft", "full", "bf16", marks=pytest.mark.slow),
        pytest.param("sft", "lora", "bf16", marks=pytest.mark.slow),
        pytest.param("sft", "mos", "fp32", marks=pytest.mark.slow),
        pytest.param("reward", "full", "autocast", marks=pytest.mark.slow),
        pytest.param("dpo", "lora", "fp32", marks=pytest.mark.slow),
    ],
)
def test_fine_tuning_in_shards(tmp_path, objective, tuner, precision):
    """With what is computed before the run, a new head, an adapter, and examples held out; and others go on."""
    base, talks = make_chat_model(tmp_path / "base"), [turns(f"what is {i}", f"{i} a word") for i in range(24)]
    key, records = "chats", [{"messages": talk} for talk in talks]
    if objective != "sft":
        key, rejected = "preferences", [turns(f"what is {i}", "no") for i in range(24)]
        records = [{"chosen": one, "rejected": other} for one, other in zip(talks, rejected, strict=True)]
    data = {"held_out": 0.25, key: str(write_lines(tmp_path / "data.jsonl", records))}
    options = {"steps": 4, "optim": {"name": "adamw", "lr": 1e-3}, "precision": precision, "parallel": {"shard": "all"}}
    chosen = chat_config(base, data=data, objective=objective, tuner=tuner, **options)
    alone = Run.create(chosen, tmp_path / "alone")
    assert alone.trainer.train()
    summary = alone.finish()

    def work(world: World) -> float:
        torch.set_num_threads(1)
        run = Run.create(chosen, tmp_path / "run", world)
        assert run.trainer.train()
        measured = run.finish()["held_out_loss"]
        assert Run.reopen(tmp_path / "run", world, ["steps=5"]).trainer.train()
        return measured

    near = 1e-5 if precision == "fp32" else 1e-2
    assert agreed(2, work) == [pytest.approx(summary["held_out_loss"], rel=near)] * 2
    losses = [
        [each["loss"] for each in read_metrics(run / "metrics.jsonl")] for run in (tmp_path / "run", alone.folder)
    ]
    assert losses[0][:4] == pytest.approx(losses[1], rel=near)
    assert hub.dtype_of(tmp_path / "run" / "model") == hub.dtype_of(alone.folder / "model")
    for part in ("model", "adapter") if tuner != "full" else ("model",):
        one, other = tensors(tmp_path / "run" / part), tensors(alone.folder / part)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=10 * near, atol=near, msg=name)
    assert Run.reopen(tmp_path / "run", None, ["steps=6"]).trainer.train()


@pytest.mark.slow
def test_the_command_line_in_shards(store, tmp_path):
    """torchrun starts two, which compile their layers; three, which do not make whole pairs; and one goes on alone."""
    batch = {**BATCH, "stages": [{"length": 32}]}
    check_command_line(tmp_path, store, "parallel.shard=2", "parallel.shard=all", batch=batch)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parallel": {"shard": 2, "pipeline": 2}}, "give parallel.pipeline or parallel.shard, not both"),
        ({"parallel": {"shard": 0}}, "parallel.shard"),
    ],
)
def test_what_cannot_be_sharded_is_refused(store, changes, told):
    with pytest.raises(ConfigError, match=told):
        options(store, **changes)
