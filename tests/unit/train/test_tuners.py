"""Runs that train a part of a model, or what is added to it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from penstock.core.errors import CheckpointError, ConfigError
from penstock.core.progress import silent
from penstock.models import hub
from penstock.train.rates import Rates
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_chats import chat_config, make_chat_model, turns, write_lines
from tiny_runs import assert_same_bits

LORA = {"name": "lora", "rank": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    records = [{"messages": turns(f"what is {i}?", f"{i} a word")} for i in range(8)]
    path = write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", records)
    return {"chats": str(path), "held_out": 0.3}


def weights(folder) -> dict[str, torch.Tensor]:
    return dict(hub.load(folder, dtype=torch.float32).named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapters_run_leaves_the_adapter_and_the_merged_model(model, data, tmp_path, precision):
    options = chat_config(model, data=data, tuner=LORA, steps=4, precision=precision)
    summary = train_to_the_end(Run.create(options, tmp_path / "run"), silent)
    merged, added, base = (weights(tmp_path / name) for name in ("run", "run/adapter", model))
    assert summary["held_out_loss"] > 0
    for name, parameter in merged.items():
        torch.testing.assert_close(parameter, added[name], rtol=0, atol=1e-5 if precision == "fp32" else 1e-2)
        tuned = name.startswith("layers.") and "norm" not in name
        # In bf16 the base is rounded, too.
        assert precision == "bf16" or torch.equal(parameter, base[name]) != tuned
    stored = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (stored["r"], stored["base_model_name_or_path"]) == (4, str(model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapters_run_resumes_bit_for_bit(model, data, tmp_path, precision):
    options = chat_config(
        model, data=data, tuner=LORA, steps=6, checkpoint_steps=3, keep_checkpoints=9, precision=precision
    )
    Run.create(options, tmp_path / "whole").trainer.train()
    Run.create(options, tmp_path / "run").trainer.train()
    last = tmp_path / "run" / "checkpoints" / "step-00000006"
    (last / "config.json").unlink()
    Run.reopen(tmp_path / "run").trainer.train()
    assert_same_bits(last, tmp_path / "whole" / "checkpoints" / "step-00000006")
    with pytest.raises(CheckpointError, match="was written with the tuner"):
        Run.reopen(tmp_path / "run", overrides=["tuner.rank=2"])


def test_frozen_parts_stay(model, data, tmp_path):
    tuner = {"name": "full", "frozen": ["embedding.*", "layers.0.*"]}
    options = chat_config(model, data=data, tuner=tuner, steps=2)
    train_to_the_end(Run.create(options, tmp_path / "run"), silent)
    before = weights(model)
    for name, parameter in weights(tmp_path / "run").items():
        assert torch.equal(parameter, before[name]) == name.startswith(("embedding.", "layers.0."))


def test_rates_scale_the_first_step(model, data, tmp_path):
    """What a parameter moves by in AdamW's first step is its rate, whatever the gradient."""
    options = chat_config(model, data=data, steps=1, rates={"layers.0.*": 0.5, "layers.*": 2.0}, clip=None)
    run = Run.create(options, tmp_path / "run")
    before = {name: p.detach().clone() for name, p in run.trainer.model.named_parameters()}
    run.trainer.train()
    for name, parameter in run.trainer.model.named_parameters():
        factor = 0.5 if name.startswith("layers.0.") else 2.0 if name.startswith("layers.") else 1.0
        moved = (parameter - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-2 * factor, rel=1e-3)


def test_rates_of_what_is_not_there_are_refused():
    with pytest.raises(ConfigError, match="rates names 'heads'"):
        Rates({"layers.0.weight": torch.nn.Parameter(torch.zeros(1))}, {"heads": 2.0})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tuner": {**LORA, "targets": ["q_pro"]}}, "tuner.targets names 'q_pro', .* did you mean .*'q_proj'"),
        ({"tuner": {"frozen": ["head"]}}, "tuner.frozen names 'head', and no parameter is called so"),
        ({"tuner": {"frozen": ["*"]}}, "tuner.frozen leaves nothing to train"),
        ({"tuner": LORA, "parallel": {"pipeline": 2}}, "a pipeline trains all weights at one rate"),
    ],
)
def test_what_cannot_be_tuned_is_refused(model, data, tmp_path, changes, why):
    with pytest.raises(ConfigError, match=why):
        Run.create(chat_config(model, data=data, **changes), tmp_path / "run")


def test_an_adapter_is_small(model, data, tmp_path):
    """The folder of an adapter holds nothing but it."""
    train_to_the_end(Run.create(chat_config(model, data=data, tuner=LORA, steps=1), tmp_path / "run"), silent)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(4 in tensor.shape for tensor in stored.values())
    assert all("lora_" in name for name in stored)
