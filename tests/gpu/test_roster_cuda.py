"""Copies of tokens with other experts on CUDA, beside steps that are graphs: with next to no noise, each copy is the
token itself, so that its scores are those of a step without copies."""

from __future__ import annotations

import pytest
import torch

from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.roster import Roster
from penstock.serve.messages import Request

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=4, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024,
    moe=MoEConfig(experts=8, ffn=512),
)  # fmt: skip

#: Of log-probabilities: bf16 products of another number of rows are added up in another order.
TOLERANCE = 0.05


def test_copies_without_noise_say_what_the_model_says():
    with torch.device("cuda"):
        model = Decoder(SHAPE)
    model = model.initialize(0).to("cuda", torch.bfloat16).eval()
    engine = build_engine(model, EngineConfig(sequences=16, cache_tokens=16384, check=True))
    told: dict[str, list[float]] = {}
    for rule in (None, Roster(copies=4, noise=1e-9)):
        for number in range(12):
            prompt = [(7 * number + place) % SHAPE.vocabulary for place in range(60 + number)]
            chosen = rule if number % 2 else None
            sampling = SamplingParams(temperature=0, max_tokens=1 + number, ignore_eos=True, logprobs=0, rule=chosen)
            engine.add(Request(f"{number}{'' if rule is None else ' again'}", prompt, sampling))
        while engine.busy:
            for delta in engine.step():
                told.setdefault(delta.id, []).extend(delta.logprobs.logprobs if delta.logprobs else ())
    for number in range(12):
        plain, again = told[str(number)], told[f"{number} again"]
        assert len(plain) == len(again) == 1 + number
        assert abs(plain[0] - again[0]) < TOLERANCE  # later ones may stand behind other tokens
