"""Runs that train a part of a model, or what is added to it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import profile

from penstock.core.config import build
from penstock.core.errors import CheckpointError, ConfigError
from penstock.core.progress import silent
from penstock.models import hub
from penstock.models.adapters.low_rank import attached
from penstock.models.adapters.shards import Pool
from penstock.models.attention import CausalRows
from penstock.train.config import TrainConfig
from penstock.train.rates import Rates
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from penstock.train.tuners.lora import LoRA
from penstock.train.tuners.mos import MixtureOfShards
from tiny_chats import chat_config, make_chat_model, turns, write_lines
from tiny_runs import assert_same_bits

LORA, MOS = {"name": "lora", "rank": 4}, {"name": "mos", "rank": 4, "budget": 2}
DYNMOLE = {"name": "dynmole", "rank": 2, "experts": 4, "threshold": 1.2}


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


@pytest.mark.parametrize(("tuner", "precision"), [(LORA, "fp32"), (LORA, "bf16"), (MOS, "fp32")])
def test_an_adapters_run_leaves_the_adapter_and_the_merged_model(model, data, tmp_path, tuner, precision):
    options = chat_config(model, data=data, tuner=tuner, steps=4, precision=precision)
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


@pytest.mark.parametrize(
    ("tuner", "last_written", "changes"),
    [
        (LORA, "config.json", {"precision": "fp32"}),
        (LORA, "config.json", {"precision": "bf16"}),
        (MOS, "config.json", {"precision": "bf16"}),
        (DYNMOLE, "adapter_config.json", {"precision": "fp32", "activation_checkpointing": True}),
        (DYNMOLE, "adapter_config.json", {"precision": "bf16", "checkpoint_background": True}),
    ],
)
def test_an_adapters_run_resumes_bit_for_bit(model, data, tmp_path, tuner, last_written, changes):
    options = chat_config(model, data=data, tuner=tuner, steps=4, checkpoint_steps=2, keep_checkpoints=9, **changes)
    Run.create(options, tmp_path / "whole").trainer.train()
    Run.create(options, tmp_path / "run").trainer.train()
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    (last / last_written).unlink()
    Run.reopen(tmp_path / "run").trainer.train()
    assert_same_bits(last, tmp_path / "whole" / "checkpoints" / "step-00000004")
    with pytest.raises(CheckpointError, match="was written with the tuner"):
        Run.reopen(tmp_path / "run", overrides=["tuner.rank=3"])


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


def adapted(model, tuner):
    decoder = hub.load(model, dtype=torch.float32).double()
    tuner.attach(decoder, 0)
    return decoder, [p for p in decoder.parameters() if p.requires_grad]


@pytest.mark.parametrize(("budget", "private", "shards"), [(2, 1, 4), (3, 0, 2), (1, 0, 1)])
def test_pools_of_shards_have_as_many_numbers_as_lora_of_their_budget(model, budget, private, shards):
    """The paper's count, whatever the rank of what is put together of them."""
    pools = adapted(model, MixtureOfShards(rank=12, budget=budget, private=private, shards=shards))[1]
    assert sum(p.numel() for p in pools) == sum(p.numel() for p in adapted(model, LoRA(rank=budget))[1])


def test_private_vectors_in_one_piece_are_lora(model):
    """Outputs bit for bit, and gradients up to rounding."""
    lora, mos = LoRA(rank=3, alpha=6.0), MixtureOfShards(rank=3, budget=3, private=3, shards=1, alpha=6.0)
    (plain, _), (sharded, _) = adapted(model, lora), adapted(model, mos)
    draw = torch.Generator().manual_seed(0)
    pairs = dict(attached(plain)), dict(attached(sharded))
    for name, layer in pairs[0].items():
        for place, (a, b) in layer.additions().items():
            other = vars(pairs[1][name])["pools"][place]
            for mine, which in ((a, "a"), (b.T, "b")):
                mine.data.copy_(torch.randn(mine.shape, generator=draw))
                other.get_parameter(which).data[getattr(pairs[1][name], f"{which}{place}")] = mine.data
    tokens, context = torch.arange(20)[None], CausalRows.of(20, "cpu")
    hidden = [each(tokens, context).hidden for each in (plain, sharded)]
    assert torch.equal(*hidden)
    for each in hidden:
        each.pow(3).sum().backward()
    for name, layer in pairs[0].items():
        for place in layer.additions():
            other = vars(pairs[1][name])["pools"][place]
            for mine, which in ((layer.a[str(place)].grad, "a"), (layer.b[str(place)].grad.T, "b")):
                rows = getattr(pairs[1][name], f"{which}{place}")
                torch.testing.assert_close(other.get_parameter(which).grad[rows], mine, rtol=1e-9, atol=1e-12)
                assert mine.abs().max() > 1e-3


def test_the_additions_to_a_layer_are_few_products(model):
    """Beside the layer's own, however many pieces it is stacked of: one with the A's and one with the B's, for the
    gradient two more each; and they give what adding the pieces' products one by one does."""
    decoder, _ = adapted(model, LoRA(rank=3, alpha=5.0))
    layer = dict(attached(decoder))["layers.0.attention.qkv"]
    draw = torch.Generator().manual_seed(0)
    parts = [part for pair in layer.additions().values() for part in pair]
    for part in parts:
        part.data.copy_(torch.randn(part.shape, generator=draw))
    x = torch.randn(2, 7, layer.in_features, generator=draw, dtype=torch.float64, requires_grad=True)
    with profile() as seen:
        out = layer(x)
        out.sin().sum().backward()
    assert sum(event.count for event in seen.key_averages() if event.key in ("aten::mm", "aten::addmm")) == 2 + 6
    got = [out, x.grad, *(part.grad for part in parts)]
    added = [b @ (a @ x[..., None]) for a, b in layer.additions().values()]
    plain = x @ layer.weight.T + 5 / 3 * torch.cat(added, -2)[..., 0]
    wanted = [plain, *torch.autograd.grad(plain.sin().sum(), [x, *parts])]
    assert len(parts) == 6
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_shards_are_chosen_apart_and_none_twice_before_each_was_taken():
    pool = Pool(torch.zeros(1), inputs=8, rows=12, layers=6, budget=3, private=1, cuts=4)
    a, b = (pool.picked(which, 2, 4, 0, "x") for which in ("a", "b"))
    assert a[:4].tolist() == b[:4].tolist() == [48 + 2 * 4 + i for i in range(4)]
    assert len(set(a.tolist())) == 16
    assert max(a[4:].tolist()) < 48
    assert a[4:].tolist() != b[4:].tolist()
    assert a[4:].tolist() != pool.picked("a", 3, 4, 0, "x")[4:].tolist()
    often = pool.picked("a", 0, 1 + 36, 0, "x")[4:].bincount()
    assert often.tolist() == [3] * 48


@pytest.mark.parametrize(
    ("options", "why"),
    [({"budget": 2, "private": 3}, "is above budget"), ({"budget": 2, "private": 2}, "no others are left for rank 16")],
)
def test_impossible_pools_are_refused(options, why):
    with pytest.raises(ConfigError, match=why):
        build(TrainConfig, {"start_from": "python-1m", "steps": 1, "tuner": {"name": "mos", **options}})
