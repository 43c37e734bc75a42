"""Heads that draft, beside a target whose steps are graphs: its tokens stay, and an exit behind all layers is right."""

from __future__ import annotations

import pytest
import torch

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.heads.eagle import Eagle
from penstock.models.heads.early_exit import EarlyExit
from penstock.models.heads.headed import Headed
from penstock.models.heads.hidden_transfer import HiddenTransfer
from penstock.models.heads.medusa import Medusa
from penstock.models.heads.ppd import ParallelPrompts
from penstock.policy import create
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=6, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024, qk_norm=True
)


HEADS = [
    EarlyExit(layers=6),
    EarlyExit(layers=2),
    Medusa(heads=3),
    Eagle(),
    HiddenTransfer(left=3),
    HiddenTransfer(left=1),
    ParallelPrompts(),
]


@pytest.fixture(scope="module")
def model() -> Decoder:
    with torch.device("cuda"):
        made = Decoder(SHAPE)
    return made.initialize(0).to("cuda", torch.bfloat16).eval()


@pytest.mark.parametrize("loop", ["plain", "overlapped"])
@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_heads_draft_beside_graphs(model, kind, loop):
    head = Headed.new(model, kind, 0).head.eval()
    draft = create("speculate.drafter", kind.drafter, source="a head", tokens=3)
    config = EngineConfig(sequences=16, memory=0.5, draft=draft, controller="fixed", loop=loop, check=True)
    engine = build_engine(model, config, draft=head)
    lengths: dict[str, int] = {}
    for number in range(24):
        prompt = [(7 * number + place * (3 + number)) % SHAPE.vocabulary for place in range(60 + number)]
        sampling = SamplingParams(temperature=0.5 * (number % 2), seed=number, max_tokens=40, ignore_eos=True)
        engine.add(Request(str(number), prompt, sampling))
    while engine.busy:
        for delta in engine.step():
            lengths[delta.id] = lengths.get(delta.id, 0) + len(delta.tokens)
    assert set(lengths.values()) == {40} and len(lengths) == 24
    now = engine.snapshot()
    assert now.drafted_tokens > 0
    if kind == EarlyExit(layers=6):
        # Not always: a pass for several tokens of a sequence rounds otherwise than one for one.
        assert now.accepted_tokens > 0.8 * now.drafted_tokens
