"""The law of ``model.family``.

Bugs that its clauses are there to catch:

- logits: a weight in another's place, or transposed; another norm, angle, window or activation than the family's; a
  default that transformers takes for a key that config.json leaves out.
- round trip: a tensor that is lost, renamed or rounded on its way to disk; a key of config.json that changes.
- reading: a switch of config.json that is read and cannot be written, so that a model that was loaded cannot be saved.
- shapes: a model that the family cannot hold, and that is written nevertheless, as another model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from penstock.core.errors import ModelError
from penstock.core.randomness import numpy_generator
from penstock.models import hub
from penstock.models.config import DecoderConfig, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family, effective
from penstock.testing.refusals import refused
from penstock.testing.transformers_peer import (
    SHAPE,
    double,
    expected,
    peer,
    prompt,
    published,
    randomize,
    stepwise,
    whole,
)

TOKENS = prompt()

SCALINGS = (
    None,
    LinearScaling(factor=2.5),
    Llama3Scaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=32),
    YarnScaling(factor=2.0, original_context=32, beta_fast=16.0),
    YarnScaling(factor=2.0, original_context=32, mscale=1.0, mscale_all_dim=0.5, truncate=False),
)


def check(family: Family) -> None:
    """Asserts the law of ``model.family``, in temporary folders, against the model of that name in transformers."""
    with tempfile.TemporaryDirectory() as folder:
        check_logits(family, Path(folder) / "logits")
        check_round_trip(family, Path(folder) / "round")
        check_reading(family)
        draw = numpy_generator(0, "testing/model.family")
        for number in range(40):
            check_shape(family, changes(draw), Path(folder) / f"shape-{number}")


def check_logits(family: Family, folder: Path) -> None:
    """Logits are transformers', of a float32 folder and a float64 one, of the whole prompt at once and step by step."""
    name = family.policy_name
    for reference, tolerance in ((peer(name), 1e-4), (double(name), 1e-9)):
        place = folder / str(reference.dtype)
        reference.save_pretrained(place)
        decoder, want = hub.load(place), expected(reference, TOKENS)
        assert decoder.embedding.weight.dtype == reference.dtype
        torch.testing.assert_close(whole(decoder, TOKENS), want, rtol=0, atol=tolerance)
        torch.testing.assert_close(stepwise(decoder, TOKENS), want, rtol=0, atol=tolerance)


def check_round_trip(family: Family, folder: Path) -> None:
    """transformers' folder, loaded and saved in bfloat16, is the same folder to transformers, byte for byte."""
    there, back = folder / "there", folder / "back"
    reference = peer(family.policy_name, torch.bfloat16, bos_token_id=3, eos_token_id=[4, 5])
    reference.save_pretrained(there)
    hub.save(hub.load(there), back)
    before, after = load_file(there / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys(), f"tensors differ: {sorted(before.keys() ^ after.keys())}"
    for key, tensor in before.items():
        assert after[key].dtype == torch.bfloat16, f"{key} is {after[key].dtype}"
        assert torch.equal(after[key].view(torch.int16), tensor.view(torch.int16)), f"{key} has changed"
    lost = _plain(back).items() - _plain(there).items()
    assert not lost, f"transformers now reads {sorted(lost)}"
    assert json.loads((back / "config.json").read_text())["model_type"] == family.policy_name
    torch.testing.assert_close(expected(published(back), TOKENS), expected(reference, TOKENS), rtol=0, atol=0)


def _plain(folder: Path) -> dict[str, str]:
    """What transformers understands of a folder, less where it lies and what it does not use."""
    data = AutoConfig.from_pretrained(folder).to_dict()
    if not data.get("use_sliding_window", True):
        data.pop("max_window_layers", None)
    return {key: str(value) for key, value in data.items() if key not in ("_name_or_path", "transformers_version")}


def check_reading(family: Family) -> None:
    """What the family reads it can write, whichever switch of config.json is turned."""
    hub: dict[str, Any] = AutoConfig.for_model(family.policy_name, **SHAPE).to_dict()
    for key, value in hub.items():
        if isinstance(value, bool):
            try:
                config = family.config_from_hub({**hub, key: not value})
            except ModelError:
                continue
            lost = family.losses(config)
            assert not lost, f"a folder with {key} = {not value} is read, and cannot be written for its {lost}"


def changes(draw: np.random.Generator) -> dict[str, Any]:
    """Some fields of a Decoder's shape, at random."""

    def either() -> bool:
        return bool(draw.random() < 0.5)

    drawn: dict[str, Callable[[], Any]] = {
        "tied": either,
        "kv_heads": lambda: (1, 2, 4)[draw.integers(3)],
        "norm_eps": lambda: draw.uniform(1e-6, 1e-2),
        "window": lambda: (None, 1, 4, 30)[draw.integers(4)],
        "windowed_layers": lambda: tuple(layer for layer in range(3) if either()),
        "qkv_bias": either,
        "output_bias": either,
        "mlp_bias": either,
        "qk_norm": either,
    }
    # Few at a time: no family expresses them all.
    chosen = {key: value() for key, value in drawn.items() if draw.random() < 0.25}
    return {"rope": RopeConfig(theta=10 ** draw.uniform(2, 6), scaling=SCALINGS[draw.integers(5)]), **chosen}


def check_shape(family: Family, changed: dict[str, Any], folder: Path) -> None:
    """A shape either comes back from disk, to us and with equal logits to transformers, or is refused."""
    name = family.policy_name
    shape = family.config_from_hub(AutoConfig.for_model(name, **SHAPE).to_dict())
    config = DecoderConfig.model_validate({**shape.model_dump(), **changed})
    decoder = randomize(Decoder(config))
    if family.losses(config):
        with refused(ModelError, name):
            hub.save(decoder, folder, family=name)
        assert not folder.exists(), f"{changed} is refused, and written nevertheless"
        return
    hub.save(decoder, folder, family=name)
    assert effective(hub.read_config(folder)) == effective(config), f"{changed} come back as another shape"
    torch.testing.assert_close(expected(published(folder), TOKENS), whole(decoder, TOKENS), rtol=0, atol=1e-4)
