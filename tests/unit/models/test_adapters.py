"""Low-rank adapters beside PEFT: folders of either are read by the other, and compute the same."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from penstock.core.errors import ModelError
from penstock.models import hub
from penstock.models.adapters import low_rank
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.train.tuners.lora import LoRA
from tiny_chats import SHAPE

TOKENS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, tmp_path_factory):
    """A base whose matrices are stacked in ours, and one whose matrices are [in, out] on disk."""
    folder = tmp_path_factory.mktemp("base") / request.param
    if request.param == "gpt2":
        options = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 40}
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(**options, initializer_range=0.2)).save_pretrained(folder)
    else:
        shape = {**SHAPE, "vocabulary": 40, "init_std": 0.2}
        hub.save(Decoder(DecoderConfig(**shape)).initialize(0), folder, family=request.param)
    return folder


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, Decoder):
            return model.logits(model(TOKENS, CausalRows.of(TOKENS.shape[1])).hidden)
        return model(TOKENS).logits


def tuned(base) -> tuple[Decoder, LoRA]:
    """The base with an adapter that does something."""
    model, tuner = hub.load(base), LoRA(rank=3, alpha=7.0)
    tuner.attach(model, 0)
    for _, layer in low_rank.attached(model):
        for b in layer.b.values():
            torch.nn.init.normal_(b, std=0.3)
    return model, tuner


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """To the fifth digit of the largest score."""
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def test_peft_reads_what_we_write(base, tmp_path):
    model, tuner = tuned(base)
    tuner.write(model, tmp_path, str(base))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    assert not torch.allclose(scores(model), scores(hub.load(base)), atol=1e-2)
    assert alike(scores(model), scores(theirs))
    assert alike(scores(tuner.merged(model)), scores(theirs))


@pytest.mark.parametrize("rslora", [False, True])
def test_we_open_what_peft_writes(base, tmp_path, rslora):
    """A folder of an adapter is a model: it is merged into the base that it names."""
    options = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False, use_rslora=rslora)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), options).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    assert alike(scores(hub.load(tmp_path / "adapter")), scores(theirs))
    again = hub.load_for_inference(tmp_path / "adapter")
    assert alike(scores(again), scores(theirs))


def test_only_the_matrices_that_are_asked_for_get_something(base):
    model = hub.load(base)
    modules = [piece.module for pieces in low_rank.linears(model, hub.family_of(model)).values() for piece in pieces]
    one = modules[0].rpartition(".")[2]
    LoRA(rank=2, targets=(one,)).attach(model, 0)
    found = [layer.pieces[int(place)].module for _, layer in low_rank.attached(model) for place in layer.a]
    assert found == [module for module in modules if module.endswith(one)]


def written(base, tmp_path):
    model, tuner = tuned(base)
    (tmp_path / "adapter").mkdir()
    tuner.write(model, tmp_path / "adapter", str(base))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"use_dora": True}, "adapters with use_dora are not supported"),
        ({"peft_type": "IA3"}, "only adapters of the type LORA without biases"),
        ({"bias": "all"}, "only adapters of the type LORA without biases"),
        ({"base_model_name_or_path": None}, "does not name its base_model_name_or_path"),
    ],
)
def test_adapters_of_other_kinds_are_refused(base, tmp_path, change, why):
    folder = written(base, tmp_path)
    stored = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(stored | change))
    with pytest.raises(ModelError, match=why):
        hub.load(folder)


def test_an_adapter_of_another_model_and_a_damaged_one_are_refused(base, tmp_path):
    folder = written(base, tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, first: tensors[first][:-1].contiguous()}, path)
    with pytest.raises(ModelError, match="and its base has it as"):
        hub.load(folder)
    save_file({name: each for name, each in tensors.items() if name != first}, path)
    with pytest.raises(ModelError, match="has no lora_B that fits it"):
        hub.load(folder)
    save_file({name.replace("0", "7"): each for name, each in tensors.items()}, path)
    with pytest.raises(ModelError, match="and its base has no such matrix"):
        hub.load(folder)
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is damaged"):
        hub.load(folder)
    path.unlink()
    with pytest.raises(ModelError, match="is missing"):
        hub.load(folder)
