"""The law of ``model.family``.

Bugs that its clauses are there to catch:

- logits: a weight in another's place, or transposed; another norm, angle, window, mask or activation than the family's;
  a default that transformers takes for a key that config.json leaves out.
- gradients: a weight that is not trained, or trained along another way than it is computed.
- engine: what is kept of a token is not what a whole pass makes of it; a feature that the cache's backend forgets.
- round trip: a tensor that is lost, renamed or rounded on its way to disk; a key of config.json that changes.
- reading: a switch of config.json that is read and cannot be written, so that a model that was loaded cannot be saved.
- shapes: a model that the family cannot hold, and that is written nevertheless, as another model.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from penstock.core.errors import ModelError
from penstock.core.randomness import numpy_generator, torch_generator
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family, effective
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.testing.refusals import refused
from penstock.testing.transformers_peer import (
    SHAPE,
    differentiable,
    expected,
    peer,
    prompt,
    published,
    randomize,
    stepwise,
    stored,
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

#: Shapes that are drawn, and how many of those that the family can hold are written and read by transformers.
DRAWN, WRITTEN = 40, 2


def check(family: Family) -> None:
    """Asserts the law of ``model.family``, in temporary folders, against the model of that name in transformers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = peer(family.policy_name, torch.float64, **family.example)
        decoder = check_logits(reference, folder / "double")
        check_engine(reference, decoder)
        check_single(family, folder / "single")
        check_round_trip(family, folder / "single", folder / "back")
        check_gradients(reference, decoder, folder / "gradients")
        check_reading(family)
        check_shapes(family, folder / "shapes")


def check_logits(reference: PreTrainedModel, folder: Path) -> Decoder:
    """The logits of transformers' ``reference``, in float64, are those of its folder, of the whole prompt at once and
    step by step; returns the decoder."""
    reference.save_pretrained(folder)
    decoder, want = hub.load(folder), expected(reference, TOKENS)
    assert decoder.embedding.weight.dtype == torch.float64
    torch.testing.assert_close(whole(decoder, TOKENS), want, rtol=0, atol=1e-9)
    torch.testing.assert_close(stepwise(decoder, TOKENS), want, rtol=0, atol=1e-9)
    return decoder


def check_single(family: Family, folder: Path) -> None:
    """The same in float32, relative to the largest logit."""
    reference = peer(family.policy_name, bos_token_id=3, eos_token_id=[4, 5], **family.example)
    reference.save_pretrained(folder)
    decoder, want = hub.load(folder), expected(reference, TOKENS)
    assert decoder.embedding.weight.dtype == torch.float32
    tolerance = 1e-5 * float(want.abs().max())
    torch.testing.assert_close(whole(decoder, TOKENS), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(stepwise(decoder, TOKENS), want, rtol=0, atol=tolerance)


def check_engine(reference: PreTrainedModel, decoder: Decoder) -> None:
    """What the engine says, with prompts in chunks over a paged cache, is what transformers finds most probable."""
    config = EngineConfig(tokens=8, sequences=2, block_size=4, cache_tokens=80)
    engine, said = build_engine(decoder.eval(), config), defaultdict[int, list[int]](list)
    for row, tokens in enumerate(TOKENS.tolist()):
        engine.add(Request(str(row), tokens, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)))
    while engine.busy:
        for delta in engine.step():
            said[int(delta.id)] += delta.tokens
    answers = torch.tensor([said[row] for row in range(len(TOKENS))])
    likely = expected(reference, torch.cat([TOKENS, answers], 1)).argmax(-1)
    assert torch.equal(likely[:, TOKENS.shape[1] - 1 : -1], answers), "the engine says something else"


def check_round_trip(family: Family, there: Path, back: Path) -> None:
    """transformers' folder, loaded and saved, is the same folder to transformers, byte for byte."""
    hub.save(hub.load(there), back)
    before, after = load_file(there / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys(), f"tensors differ: {sorted(before.keys() ^ after.keys())}"
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, f"{key} is {after[key].dtype}"
        assert torch.equal(after[key], tensor), f"{key} has changed"
    lost = _plain(back).items() - _plain(there).items()
    assert not lost, f"transformers now reads {sorted(lost)}"
    assert json.loads((back / "config.json").read_text())["model_type"] == family.policy_name
    logits = [expected(published(folder), TOKENS) for folder in (there, back)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


#: Keys that others follow from, which are written out; and rotations, whose defaults are written out too.
DERIVED = {
    "max_window_layers",
    "no_rope_layer_interval",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "interleave_moe_layer_step",
    "rope_parameters",
    "rotary_dim",
    "_name_or_path",
    "transformers_version",
}


def _plain(folder: Path) -> dict[str, str]:
    """What transformers understands of a folder, of what matters."""
    data = AutoConfig.from_pretrained(folder).to_dict()
    return {key: str(value) for key, value in data.items() if key not in DERIVED}


def check_gradients(reference: PreTrainedModel, decoder: Decoder, folder: Path) -> None:
    """The gradients of a random sum of logits, in float64, are transformers' for every weight: a folder that holds
    transformers' in place of the weights is one that holds ours."""
    weights = torch.randn(*TOKENS.shape, SHAPE["vocab_size"], generator=torch_generator(0, "probe"))

    def gradients(logits: Tensor, model: torch.nn.Module) -> None:
        torch.autograd.backward((logits * weights).sum())
        for weight in stored(model).values():
            weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad

    gradients(differentiable(reference, TOKENS), reference)
    gradients(decoder.logits(decoder(TOKENS, CausalRows.of(TOKENS.shape[1])).hidden), decoder)
    reference.save_pretrained(folder)
    wanted = {name: parameter.detach() for name, parameter in hub.load(folder).named_parameters()}
    for name, parameter in decoder.named_parameters():
        scale = max(1.0, float(wanted[name].abs().max()))
        difference = float((parameter.detach() - wanted[name]).abs().max()) / scale
        assert difference < 1e-9, f"the gradient of {name} differs by {difference:.1e}"


def check_reading(family: Family) -> None:
    """What the family reads it can write, whichever switch of config.json is turned."""
    hub: dict[str, Any] = AutoConfig.for_model(family.policy_name, **{**SHAPE, **family.example}).to_dict()
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
        "norm_place": lambda: ("before", "after", "both")[draw.integers(3)],
        "attention_cap": lambda: (None, 3.0)[draw.integers(2)],
        "logits_scale": lambda: (1.0, 0.25)[draw.integers(2)],
        "unrotated_layers": lambda: tuple(layer for layer in range(3) if either()),
    }
    # Few at a time: no family expresses them all.
    chosen = {key: value() for key, value in drawn.items() if draw.random() < 0.25}
    if either():
        chosen["rope"] = RopeConfig(theta=10 ** draw.uniform(2, 6), scaling=SCALINGS[draw.integers(5)])
    return chosen


def check_shapes(family: Family, folder: Path) -> None:
    """A shape either comes back from disk, to us and with equal logits to transformers, or is refused."""
    draw = numpy_generator(0, "testing/model.family")
    keys = AutoConfig.for_model(family.policy_name, **{**SHAPE, **family.example}).to_dict()
    shape = family.config_from_hub(keys).model_dump()
    written = refusals = 0
    for _ in range(DRAWN):
        try:
            config = DecoderConfig.model_validate({**shape, **changes(draw)})
        except ValueError:
            continue
        if not family.losses(config) and written < WRITTEN:
            written += 1
            check_written(family, config, folder / str(written))
        elif family.losses(config) and not refusals:
            refusals += 1
            with refused(ModelError, family.policy_name):
                hub.save(Decoder(config), folder / "refused", family=family.policy_name)
            assert not (folder / "refused").exists(), "a shape is refused, and written nevertheless"


def check_written(family: Family, config: DecoderConfig, folder: Path) -> None:
    """A shape that the family can hold comes back from disk, and to transformers computes the same."""
    decoder = randomize(Decoder(config))
    hub.save(decoder, folder, family=family.policy_name)
    assert effective(hub.read_config(folder)) == effective(config), f"{config} comes back as another shape"
    want = expected(published(folder), TOKENS)
    tolerance = 1e-4 * float(want.abs().max())
    torch.testing.assert_close(want, whole(decoder, TOKENS), rtol=0, atol=tolerance)
