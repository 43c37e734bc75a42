"""What a configuration leaves to the machine: chosen, written down with the reason, and kept on resuming."""

from __future__ import annotations

import pytest
import torch

from penstock.core.files import read_json
from penstock.core.processor import Answer
from penstock.core.progress import silent
from penstock.models.config import DecoderConfig
from penstock.train import demo, machine
from penstock.train.demo import _size
from penstock.train.machine import worth_compiling
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_runs import config


@pytest.fixture
def speed(monkeypatch):
    """Sets which dtype is fast."""

    def set_to(dtype: torch.dtype) -> None:
        monkeypatch.setattr(machine, "fast_dtype", lambda device: Answer(dtype, "products were timed"))

    return set_to


@pytest.mark.parametrize(("fast", "precision"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_precision_auto_is_the_fast_one(store, tmp_path, speed, fast, precision):
    speed(fast)
    run = Run.create(config(store, precision="auto", steps=2), tmp_path / "run")
    assert run.trainer.weights.precision == precision
    written = read_json(tmp_path / "run" / "run.json")
    assert written["precision"] == precision
    assert written["chosen"]["precision"] == f"{precision}: products were timed"


def test_a_resumed_run_keeps_its_precision(store, tmp_path, speed):
    """Also on a machine where the other one is faster: the bits come first."""
    speed(torch.bfloat16)
    assert Run.create(config(store, precision="auto", steps=2), tmp_path / "run").trainer.train()
    speed(torch.float32)
    again = Run.reopen(tmp_path / "run", overrides=["steps=4"])
    assert again.trainer.weights.precision == "bf16"
    assert again.trainer.train()


def test_what_is_asked_for_is_not_overruled(store, tmp_path, speed):
    speed(torch.bfloat16)
    run = Run.create(config(store, precision="fp32", steps=2), tmp_path / "run")
    assert (run.trainer.weights.precision, run.config.chosen) == ("fp32", {})


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_only_long_runs_are_compiled(precision):
    short, long = (worth_compiling(torch.device("cpu"), precision, seconds) for seconds in (5.0, 1e5))
    assert (short.choice, long.choice) == (False, True)
    assert "this run takes 5 s" in short.reason


def test_a_short_run_is_not_compiled_and_says_so(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: pytest.fail("compiled"))
    assert train_to_the_end(Run.create(config(store, compile="auto", steps=2), tmp_path / "run"), silent)
    assert "compile false: that pays from" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "run.json")["compile"] is False


def test_compiling_is_taken_from_the_time_for_steps(store, tmp_path):
    """Two minutes of which one went into compiling leave one: the schedule spans that."""
    trainer = Run.create(config(store, steps=None, minutes=2.0), tmp_path / "run").trainer
    trainer.length.compiling, trainer.position.seconds, trainer.position.step = 60.0, 30.0, 10
    assert trainer.progress == 0.5
    assert trainer.length.total_steps(trainer.position) == 20


def test_timing_an_update_changes_nothing(store, tmp_path):
    trainer = Run.create(config(store, steps=2), tmp_path / "run").trainer
    before = [master.detach().clone() for master in trainer.updater.masters]
    assert trainer.eager_seconds() > 0
    assert all(torch.equal(*pair) for pair in zip(before, trainer.updater.masters, strict=True))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


SHAPE = DecoderConfig(vocabulary=4096, hidden=128, layers=4, heads=2, kv_heads=2, head_dim=64, ffn=320, tied=True)


def test_the_demo_grows_with_the_machine():
    """Every size is chosen somewhere; each sees its two tokens a parameter, but for the smallest, which is for all."""
    chosen = [_size(SHAPE, 256, 10 ** (exponent / 4)) for exponent in range(40, 72)]
    sizes = [(size["hidden"], size["layers"]) for size in chosen]
    assert sizes == sorted(sizes)
    assert set(sizes) == set(demo.SIZES)
    for exponent, size in zip(range(40, 72), chosen, strict=True):
        model = SHAPE.model_copy(update=size)
        tokens = 10 ** (exponent / 4) / (3 * model.flops_per_token(256))
        assert tokens >= 2 * model.stored_parameters() or sizes[exponent - 40] == demo.SIZES[0]
