"""Checkpoints: whole or not there, found damaged where they are, and the one before used."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.core.errors import CheckpointError, PenstockError, UsageError
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.train import checkpoint
from penstock.train.run import Run
from tiny_runs import assert_same_bits, config, tensors


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> Path:
    """A run of 40 updates with its last two checkpoints, of steps 30 and 40; not to be written to."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert Run.create(config(store, average="ema", precision="bf16"), folder).trainer.train()
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_checkpoint_is_a_model_of_transformers_with_a_trainer_beside_it(trained):
    newest, faults = checkpoint.newest(trained / "checkpoints")
    assert (newest, faults) == (trained / "checkpoints" / "step-00000040", [])
    assert {path.relative_to(newest).as_posix() for path in files(newest)} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "manifest.json"),
        "trainer/state.json",
        *(f"trainer/{name}.safetensors" for name in ("optimizer", "average", "masters")),
    }
    tokens = AutoTokenizer.from_pretrained(newest)("import argparse", return_tensors="pt")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.float32)(tokens).logits
    ours = hub.load(newest, dtype=torch.float32)
    torch.testing.assert_close(ours.logits(ours(tokens, CausalRows.of(tokens.shape[1])).hidden), theirs)


def test_a_checkpoint_describes_itself(trained):
    state = checkpoint.load_state(trained / "checkpoints" / "step-00000040")
    assert {key: state.position[key] for key in ("step", "samples", "tokens")} == {
        "step": 40,
        "samples": 160,
        "tokens": 5120,
    }
    assert state.position["seconds"] > 0
    assert state.description["config"]["precision"] == "bf16"
    assert state.description["version"]
    assert set(state.tensors) == {"optimizer", "average", "masters"}


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", range(9))
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(run, damage, number):
    path = files(run / "checkpoints" / "step-00000040")[number]
    DAMAGES[damage](path)
    found, (fault,) = checkpoint.newest(run / "checkpoints")
    assert found.name == "step-00000030"
    assert str(fault).startswith(f"{run / 'checkpoints' / 'step-00000040'} is damaged: ")
    assert path.name in str(fault)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_found(trained, data):
    """In whichever file, the manifest too."""
    newest = trained / "checkpoints" / "step-00000040"
    path = data.draw(st.sampled_from(files(newest)))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[place] ^= data.draw(st.integers(1, 255))
    # White space in the manifest may change into other white space.
    assume(path.name != "manifest.json" or not whole[place : place + 1].isspace())
    path.write_bytes(flipped)
    try:
        with pytest.raises(CheckpointError, match="is damaged: "):
            checkpoint.verify(newest)
    finally:
        path.write_bytes(whole)
    checkpoint.verify(newest)


def test_a_run_passes_over_damage_and_ends_as_if_there_had_been_none(run, trained):
    (run / "checkpoints" / "step-00000040" / "model.safetensors").write_bytes(b"x")
    again = Run.reopen(run)
    assert again.notes == [
        f"passed over: {run / 'checkpoints' / 'step-00000040'} is damaged: model.safetensors is not what was written"
    ]
    assert again.trainer.position.step == 30
    assert again.trainer.train()
    assert_same_bits(run / "checkpoints" / "step-00000040", trained / "checkpoints" / "step-00000040")
    assert checkpoint.newest(run / "checkpoints")[1] == []


def test_a_save_before_a_damaged_step_leaves_only_whole_checkpoints(run):
    """The damaged one must not count among those that are kept."""
    (run / "checkpoints" / "step-00000040" / "model.safetensors").write_bytes(b"x")
    trainer = Run.reopen(run, overrides=["keep_checkpoints=1"]).trainer
    trainer.train(lambda report: os.kill(os.getpid(), signal.SIGTERM) if report.step == 33 else None)
    assert [path.name for path in checkpoint.checkpoints(run / "checkpoints")] == ["step-00000033"]
    assert checkpoint.newest(run / "checkpoints") == (run / "checkpoints" / "step-00000033", [])


def test_all_damaged_is_one_error_that_names_each(run):
    for path in (run / "checkpoints").glob("*/config.json"):
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        Run.reopen(run)
    message = str(caught.value)
    assert message.startswith(f"there is no whole checkpoint in {run / 'checkpoints'}:\n")
    assert message.count("is damaged: config.json is missing") == 2


def test_no_checkpoint_yet_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path / "checkpoints") == (None, [])


@pytest.mark.parametrize(("keep", "kept"), [(1, [40]), (2, [30, 40]), (3, [20, 30, 40]), (9, [10, 20, 30, 40])])
def test_the_newest_are_kept(store, tmp_path, keep, kept):
    Run.create(config(store, keep_checkpoints=keep), tmp_path / "run").trainer.train()
    found = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert [checkpoint.step_of(path) for path in found] == kept


def test_steps_are_ordered_as_numbers(tmp_path):
    names = ["step-00000009", "step-99999999", "step-100000000"]
    for name in (*names, "step-1", "step-", ".step-00000001.abcd1234.partial", "steps"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == names


@pytest.mark.parametrize("where", ["os.fsync", "os.rename", "shutil.copyfile", "safetensors.torch.save_file"])
def test_a_full_disk_leaves_the_older_checkpoints(run, monkeypatch, where):
    """The run ends with what to do, and with nothing half-written."""
    before = {path: path.read_bytes() for path in files(run / "checkpoints")}
    again = Run.reopen(run, overrides=["steps=50"])
    module = {"os": os, "shutil": shutil, "safetensors.torch": safetensors.torch}[where.rpartition(".")[0]]

    def fails(*_, **__):
        monkeypatch.undo()
        if module is safetensors.torch:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        disk_full()

    def once_training(report):
        if report.step == 50:
            monkeypatch.setattr(module, where.rpartition(".")[2], fails)

    with pytest.raises(CheckpointError, match=r"(?s)saved at step 50: .*No space left.*\nThose before it are intact"):
        again.trainer.train(once_training)
    assert {path: path.read_bytes() for path in files(run / "checkpoints")} == before
    assert Run.reopen(run).trainer.position.step == 40


def test_a_later_schema_is_refused(run):
    path = run / "checkpoints" / "step-00000040" / "trainer" / "state.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 7'))
    with pytest.raises(CheckpointError, match="has the schema 7, and this version of Penstock reads 1"):
        checkpoint.load_state(path.parent.parent)


def test_a_checkpoint_is_copied_whole_or_not_at_all(trained, run, tmp_path):
    source = trained / "checkpoints" / "step-00000030"
    copied = checkpoint.copy(source, tmp_path / "new")
    checkpoint.verify(copied)
    assert tensors(copied).keys() == tensors(source).keys()
    (run / "checkpoints" / "step-00000030" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is not what was written"):
        checkpoint.copy(run / "checkpoints" / "step-00000030", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    for path in (tmp_path / "nothing", run, run / "run.json"):
        with pytest.raises(UsageError, match="is not a checkpoint"):
            checkpoint.copy(path, tmp_path / "other")


def test_optimizer_state_of_other_parameters_is_refused():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([weight])
    names = {id(weight): "layers.0.weight"}
    for state, message in (
        ({"layers.1.weight/exp_avg": torch.zeros(2, 3)}, "of 'layers.1.weight', which this model does not have"),
        ({"layers.0.weight/exp_avg": torch.zeros(3, 2)}, r"of 'layers.0.weight' is \(3, 2\)"),
    ):
        with pytest.raises(PenstockError, match=message):
            checkpoint.restore_optimizer(optimizer, names, state)
