"""The law of ``model.encoder``.

Bugs that its clauses are there to catch:

- states: a weight in another's place; another norm, angle, window, position or activation than the family's; a default
  that transformers takes for a key that config.json leaves out; a text that sees another one beside it.
- scores: a head that reads another token, another activation or norm of it, the kinds of both texts forgotten.
- folder: a tensor that is missing or left over, and read over; a switch of config.json that is not heeded, and passed
  over in silence.
"""

from __future__ import annotations

import inspect
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from penstock.core.errors import ModelError
from penstock.core.randomness import torch_generator
from penstock.models.encoders.contract import EncoderFamily
from penstock.models.encoders.encoder import Encoder, Texts
from penstock.models.encoders.folder import load_classifier, load_encoder
from penstock.testing.refusals import refused
from penstock.testing.transformers_peer import SHAPE, TOKEN_IDS, Doubled, randomize

CPU = torch.device("cpu")

#: What encoders have of the shape.
SIZES = {key: value for key, value in SHAPE.items() if key != "head_dim"}

#: Of texts that are computed together; of one length, those that are neighbours in one pass.
LENGTHS = (5, 1, 9, 9, 13, 5)


def check(family: EncoderFamily) -> None:
    """Asserts the law, in temporary folders, against transformers' model of that name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = peer(family)
        reference.save_pretrained(folder / "double")
        check_states(reference, folder / "double")
        check_defaults(family, folder / "defaults")
        check_folder(folder / "double")
        check_scores(family, folder / "classifier")


def peer(family: EncoderFamily, made: type = AutoModel, **more: Any) -> PreTrainedModel:
    """transformers' model of a family in float64, with weights that make every part of it matter."""
    name = family.policy_name
    hub_name = name if name in CONFIG_MAPPING else name.replace("_", "-")
    config = AutoConfig.for_model(hub_name, **{**SIZES, **dict.fromkeys(TOKEN_IDS, 0), **family.example, **more})
    return randomize(made.from_config(config, dtype=torch.float64).eval())  # type: ignore[attr-defined]


def texts() -> list[Tensor]:
    """Token ids of several texts."""
    # The lowest numbers are special in some families.
    draw = torch_generator(0, "texts")
    return [torch.randint(4, SHAPE["vocab_size"], (length,), generator=draw) for length in LENGTHS]


@torch.inference_mode()
def states(encoder: Encoder, several: list[Tensor]) -> list[Tensor]:
    """The hidden states of texts that are computed together."""
    lengths = [len(each) for each in several]
    return list(torch.split(encoder(torch.cat(several), Texts(lengths, CPU)), lengths))


def check_states(reference: PreTrainedModel, folder: Path) -> None:
    """Asserts that each of several texts gets what transformers gives it alone, in float64, and what it gets alone."""
    encoder = load_encoder(folder, CPU, torch.float64)
    for text, found in zip(texts(), states(encoder, texts()), strict=True):
        with torch.no_grad(), Doubled():
            wanted = reference(text[None]).last_hidden_state[0]
        assert torch.allclose(found, wanted, atol=1e-9, rtol=1e-9), "hidden states differ from transformers'"
        (alone,) = states(encoder, [text])
        assert torch.allclose(alone, found, atol=1e-12, rtol=1e-12), "a text sees what is beside it"


def check_defaults(family: EncoderFamily, folder: Path) -> None:
    """Asserts the same of a folder in float32 whose config.json says no more than sizes."""
    hub_name = family.policy_name if family.policy_name in CONFIG_MAPPING else family.policy_name.replace("_", "-")
    model = randomize(AutoModel.from_config(AutoConfig.for_model(hub_name, **SIZES, pad_token_id=1)).eval())
    model.save_pretrained(folder)
    path = folder / "config.json"
    sizes = {*SIZES, "model_type", "pad_token_id"}
    told = {key: value for key, value in json.loads(path.read_text()).items() if key in sizes}
    path.write_text(json.dumps(told))
    encoder = load_encoder(folder, CPU, torch.float32)
    for text, found in zip(texts(), states(encoder, texts()), strict=True):
        with torch.no_grad():
            wanted = model(text[None]).last_hidden_state[0]
        assert torch.allclose(found, wanted, atol=2e-4, rtol=2e-4), "a default is another than transformers'"


def check_scores(family: EncoderFamily, folder: Path) -> None:
    """Asserts that each of several pairs gets the number that transformers' classifier gives it alone, in float64, and
    that one with several numbers is refused."""
    reference = peer(family, AutoModelForSequenceClassification, num_labels=1)
    reference.save_pretrained(folder)
    several, seconds = texts(), [(len(text) + 1) // 2 for text in texts()]
    classifier = load_classifier(folder, CPU, torch.float64)
    with torch.no_grad():
        found = classifier(torch.cat(several), Texts([len(each) for each in several], CPU, seconds))
    told = {"token_type_ids"} & set(inspect.signature(reference.forward).parameters)
    for text, second, number in zip(several, seconds, found.tolist(), strict=True):
        kinds = (torch.arange(len(text)) >= second).long() % getattr(reference.config, "type_vocab_size", 2)
        with torch.no_grad(), Doubled():
            wanted = reference(text[None], **dict.fromkeys(told, kinds[None])).logits.item()
        assert math.isclose(number, wanted, rel_tol=1e-9, abs_tol=1e-9), "a pair's number differs from transformers'"
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "no", "1": "yes"}}))
    with refused(ModelError, "2 kinds"):
        load_classifier(folder, CPU, torch.float32)


def check_folder(folder: Path) -> None:
    """Asserts that tensors which are missing, left over or of another shape are refused, and so is what is not done."""
    weights = load_file(folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    first = next(name for name in weights if name.endswith(("tok_embeddings.weight", "word_embeddings.weight")))
    others = {name: tensor for name, tensor in weights.items() if name != first}
    faults = {
        "lacks": others,
        "also has": {**weights, "surplus.weight": torch.ones(2)},
        "is expected": {**others, first: weights[first][:, 1:].clone()},
    }
    for part, changed in faults.items():
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with refused(ModelError, part):
            load_encoder(folder, CPU, torch.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    activation = "hidden_activation" if "hidden_activation" in described else "hidden_act"
    wrong = (
        (activation, "relu6", "activation"),
        ("num_attention_heads", 5, "heads"),
        ("vocab_size", None, "vocabulary"),
    )
    for key, value, part in wrong:
        (folder / "config.json").write_text(json.dumps(described | {key: value}))
        with refused(ModelError, part):
            load_encoder(folder, CPU, torch.float32)
