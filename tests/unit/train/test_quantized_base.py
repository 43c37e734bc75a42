"""Runs that train what is added to a base whose matrices stay quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_files import SHAPE as GGUF_SHAPE
from gguf_files import coded, write
from penstock import LLM, SamplingParams
from penstock.core.metrics import read_metrics
from penstock.core.progress import silent
from penstock.models import hub
from penstock.models.adapters.low_rank import attached
from penstock.models.attention import CausalRows
from penstock.models.companions import copy_companions
from penstock.models.decoder import Decoder
from penstock.models.formats.schemes import SCHEMES
from penstock.models.quantized import packed_layers
from penstock.testing.transformers_peer import peer
from penstock.train.objectives.next_token import NextToken
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from penstock.train.tuners.lora import LoRA
from tiny_adapters import written
from tiny_chats import chat_config, make_chat_model, turns, write_lines
from tiny_runs import assert_same_bits

LORA, MOS = {"name": "lora", "rank": 4}, {"name": "mos", "rank": 4, "budget": 2}
DYNMOLE = {"name": "dynmole", "rank": 2, "experts": 4, "threshold": 1.2}
MATRICES = 2 * 4  # those of two layers


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder in each scheme, and beside it one with the numbers that it stands for."""
    place = tmp_path_factory.mktemp("bases")
    chat = make_chat_model(place / "chat", hidden=64, ffn=96)
    found = {}
    for scheme in SCHEMES:
        packed, plain = place / scheme, place / f"{scheme}-plain"
        hub.save(hub.load(chat), packed, scheme=scheme)
        hub.save(hub.load(packed, dtype=torch.float32), plain)
        for folder in (packed, plain):
            copy_companions(chat, folder)
        found[scheme] = packed, plain
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    records = [{"messages": turns(f"what is {i}?", f"{i} a word")} for i in range(8)]
    return {"chats": str(write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", records)), "held_out": 0.3}


@pytest.fixture(scope="module")
def trained(bases, data, tmp_path_factory):
    """A finished run, and what its model scores while it is still attached."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = Run.create(chat_config(bases["w4a16"][0], data=data, tuner=LORA, steps=6), folder)
    assert train_to_the_end(run, silent)["held_out_loss"] > 0
    return run, folder, scores(run.trainer.model)


@torch.no_grad()
def scores(decoder: Decoder) -> torch.Tensor:
    tokens = torch.arange(20)[None]
    return decoder.logits(decoder(tokens, CausalRows.of(20, "cpu")).hidden)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize(
    ("scheme", "tuner"), [("w4a16", LORA), ("int8", LORA), ("fp8", LORA), ("w4a16", MOS), ("w4a16", DYNMOLE)]
)
def test_losses_are_those_beside_the_same_numbers(bases, data, tmp_path, scheme, tuner):
    for folder, base in zip(("packed", "plain"), bases[scheme], strict=True):
        run = Run.create(chat_config(base, data=data, tuner=tuner, steps=8), tmp_path / folder)
        assert len(list(packed_layers(run.trainer.model))) == (MATRICES if folder == "packed" else 0)
        run.trainer.train()
    found, wanted = losses(tmp_path / "packed"), losses(tmp_path / "plain")
    assert found == pytest.approx(wanted, rel=1e-5)
    assert wanted[-1] < 0.9 * wanted[0]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gradients_are_those_beside_a_gguf_files_numbers(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("penstock.models.formats.gguf_folder.cache_folder", lambda name: tmp_path / "cache" / name)
    write(tmp_path / "m.gguf", peer("llama", **{**GGUF_SHAPE, "num_hidden_layers": 2}), "llama", coded(kind))
    tokens, context, found = torch.arange(21)[None], CausalRows.of(20, "cpu"), []
    for load in (hub.load_to_add, hub.load):
        model = load(tmp_path / "m.gguf", dtype=torch.float32).double()
        assert type(model.head.weight) is torch.nn.Parameter  # of which the losses are computed
        LoRA(rank=3).attach(model, 0)
        draw = torch.Generator().manual_seed(0)
        for _, layer in attached(model):
            for b in layer.b.values():
                b.data.copy_(torch.randn(b.shape, generator=draw))
        hidden = model(tokens[:, :-1], context).hidden
        loss = NextToken().hidden_loss(model, hidden, type("B", (), {"targets": tokens[:, 1:]}))
        found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_the_base_stays_in_the_bytes_that_it_is_stored_in(bases, data, tmp_path, precision):
    """Half a byte a number and a scale for 32 of them, after updates as before; only what was added is updated."""
    options = chat_config(bases["w4a16"][0], data=data, tuner=LORA, steps=2, precision=precision)
    run = Run.create(options, tmp_path / "run")
    model = run.trainer.model
    before = {name: part.clone() for name, part in model.named_buffers()}
    assert any("matrices of" in note and "stay quantized" in note for note in run.notes)
    run.trainer.train()
    for _, layer in packed_layers(model):
        numbers = layer.in_features * layer.out_features
        assert sum(part.nbytes for part in layer.buffers()) == numbers // 2 + 4 * numbers // 32
    assert all(torch.equal(part, before[name]) for name, part in model.named_buffers())
    beside = [name for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() > 1]
    assert beside == list(run.trainer.weights.masters)
    assert model.parameter_count() == hub.load(bases["w4a16"][1]).parameter_count() + sum(
        master.numel() for master in run.trainer.weights.masters.values()
    )


@pytest.mark.parametrize(
    ("tuner", "changes"),
    [
        (LORA, {"precision": "fp32", "activation_checkpointing": True}),
        (LORA, {"precision": "bf16", "checkpoint_background": True}),
        (MOS, {"precision": "bf16"}),
        (DYNMOLE, {"precision": "fp32"}),
    ],
)
def test_a_run_resumes_bit_for_bit(bases, data, tmp_path, tuner, changes):
    base = bases["w4a16"][0]
    options = chat_config(base, data=data, tuner=tuner, steps=4, checkpoint_steps=2, keep_checkpoints=9, **changes)
    Run.create(options, tmp_path / "whole").trainer.train()
    Run.create(options, tmp_path / "run").trainer.train()
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    (last / "adapter_config.json").unlink()
    Run.reopen(tmp_path / "run").trainer.train()
    assert_same_bits(last, tmp_path / "whole" / "checkpoints" / "step-00000004")
    assert not (last / "model.safetensors").exists()


def test_folders_hold_what_was_added_and_open_on_the_base(bases, trained, monkeypatch, tmp_path):
    """With the scores of the run's own model, bit for bit, where the matrices stay quantized; else merged."""
    _, folder, wanted = trained
    monkeypatch.chdir(tmp_path)
    checkpoint = next((folder / "checkpoints").glob("step-*"))
    for place in (folder, folder / "model", folder / "adapter", checkpoint):
        described = json.loads(next(place.rglob("adapter_config.json")).read_text())
        assert described["base_model_name_or_path"] == str(bases["w4a16"][0])
        opened = hub.load_for_inference(place, dtype=torch.float32)
        assert len(list(packed_layers(opened))) == len(list(attached(opened))) == MATRICES
        assert torch.equal(scores(opened), wanted)
    merged = hub.load(folder, dtype=torch.float32)
    assert not list(packed_layers(merged)) and not list(attached(merged))
    torch.testing.assert_close(scores(merged), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores(hub.load(bases["w4a16"][1])), wanted, atol=1e-2)


def test_what_is_served_is_what_was_trained(trained):
    run, folder, _ = trained
    tokens = [3, 5, 7, 9]
    sampling = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    llm = LLM(str(folder), dtype="fp32", cache_tokens=256, progress=silent)
    found = llm.generate([{"prompt_token_ids": tokens}], sampling, progress=silent)[0].outputs[0].token_ids
    for token in found:
        context = CausalRows.of(len(tokens), "cpu")
        with torch.no_grad():
            wanted = run.trainer.model.logits(run.trainer.model(torch.tensor([tokens]), context).hidden)
        assert token == int(wanted[0, -1].argmax())
        tokens.append(token)


def test_a_routed_adapter_opens_beside_packed_matrices(bases, data, tmp_path, capsys):
    run = Run.create(chat_config(bases["int8"][0], data=data, tuner=DYNMOLE, steps=3), tmp_path / "run")
    train_to_the_end(run, silent)
    assert f"(an adapter on {bases['int8'][0]})" in capsys.readouterr().out
    opened = hub.load_for_inference(tmp_path / "run", dtype=torch.float32)
    assert len(list(packed_layers(opened))) == MATRICES
    assert torch.equal(scores(opened), scores(run.trainer.model))


def test_unpacked_it_is_merged(bases, data, tmp_path):
    options = chat_config(bases["w4a16"][0], data=data, tuner={**LORA, "unpack": True}, steps=1)
    run = Run.create(options, tmp_path / "run")
    assert not list(packed_layers(run.trainer.model))
    train_to_the_end(run, silent)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_another_run_starts_from_where_one_has_ended(bases, data, tmp_path):
    """What the first has added is merged; the matrices without any of it stay quantized."""
    first = {**LORA, "targets": ["o_proj"]}
    train_to_the_end(Run.create(chat_config(bases["int8"][0], data=data, tuner=first, steps=3), tmp_path / "a"), silent)
    run = Run.create(chat_config(tmp_path / "a", data=data, tuner=LORA, steps=3), tmp_path / "b")
    assert len(list(packed_layers(run.trainer.model))) == MATRICES - 2
    began = scores(run.trainer.model)
    torch.testing.assert_close(began, scores(hub.load(tmp_path / "a", dtype=torch.float32)), rtol=1e-4, atol=1e-4)
    train_to_the_end(run, silent)
    opened = hub.load_for_inference(tmp_path / "b", dtype=torch.float32)
    assert len(list(packed_layers(opened))) == MATRICES - 2
    torch.testing.assert_close(scores(opened), scores(run.trainer.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores(opened), began, atol=1e-2)


def test_it_is_not_compiled_and_says_so(bases, data, tmp_path):
    options = chat_config(bases["int8"][0], data=data, tuner=LORA, steps=1, compile=True)
    assert "stay quantized" in Run.create(options, tmp_path / "run").trainer.compile()


def test_a_reward_models_adapter_beside_packed_matrices(bases, tmp_path):
    pairs = [{"prompt": f"what is {i}?", "chosen": f"{i} a word", "rejected": "no"} for i in range(6)]
    data = {"preferences": str(write_lines(tmp_path / "pairs.jsonl", pairs)), "held_out": 0.3}
    options = chat_config(bases["int8"][0], data=data, tuner=LORA, objective="reward", steps=2)
    run = Run.create(options, tmp_path / "run")
    train_to_the_end(run, silent)
    assert len(list(packed_layers(run.trainer.model))) == MATRICES
    opened = hub.load_reward(tmp_path / "run")
    torch.testing.assert_close(scores(opened.float()), scores(run.trainer.model), rtol=1e-4, atol=1e-4)


def test_adapters_of_several_ranks_lie_beside_packed_matrices(bases, tmp_path):
    """Ranks, and with them scales, that differ within a layer; and what is added to an embedding is merged."""
    packed, plain = bases["w4a16"]
    folder = written(tmp_path / "adapter", hub.load(plain), 0, base_model_name_or_path=str(packed))
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if "q_proj.lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name] = torch.cat([tensors[name], tensors[name].flip(1)])
        tensors[other] = torch.cat([tensors[other], tensors[other].flip(0)], 1)
    beside = "base_model.model.model.embed_tokens.lora_"
    like = hub.load(plain).embedding.weight
    tensors |= {f"{beside}A.weight": torch.randn(3, like.shape[1]), f"{beside}B.weight": torch.randn(len(like), 3)}
    save_file(tensors, folder / "adapter_model.safetensors")
    opened = hub.load_for_inference(folder, dtype=torch.float32)
    assert len(list(packed_layers(opened))) == MATRICES
    wanted = scores(hub.load(folder, dtype=torch.float32))
    torch.testing.assert_close(scores(opened), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_activations_are_rounded_for_inference_alone(bases):
    """Where the scheme wants them in fp8."""
    for load, rounds in ((hub.load_to_add, False), (hub.load_for_inference, True)):
        formats = [piece.format for _, layer in packed_layers(load(bases["fp8"][0])) for piece in layer.pieces()]
        assert [each.rounds for each in formats] == [rounds] * MATRICES


def test_where_a_format_is_dequantized_in_the_hosts_memory_alone_it_does_not_stay_on_a_device(
    bases, tmp_path, monkeypatch
):
    monkeypatch.setattr("penstock.models.formats.gguf_folder.cache_folder", lambda name: tmp_path / "cache" / name)
    write(tmp_path / "m.gguf", peer("llama", **{**GGUF_SHAPE, "num_hidden_layers": 1}), "llama", coded("Q8_0"))
    assert not list(packed_layers(hub.load_to_add(tmp_path / "m.gguf", device="meta")))
    there = hub.load_to_add(bases["w4a16"][0], device="meta")
    assert all(part.is_meta for _, layer in packed_layers(there) for part in layer.buffers())
    assert len(list(packed_layers(there))) == MATRICES
