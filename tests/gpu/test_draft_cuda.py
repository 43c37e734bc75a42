"""A model that drafts, with graphs of its own: it is right about itself, and its steps are replayed."""

from __future__ import annotations

import copy

import pytest
import torch

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.serve.run.graphs import StepGraphs
from penstock.speculate.drafters.model import Model
from penstock.testing.serve_model import predictor_of

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=6, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024, qk_norm=True
)


@pytest.mark.parametrize("controller", ["fixed", "specdec_pp"])
@pytest.mark.parametrize("verifier", ["exact_match", "accept_residual"])
@pytest.mark.parametrize("loop", ["plain", "overlapped"])
def test_a_model_that_drafts_for_itself_is_nearly_always_right(loop, verifier, controller, monkeypatch):
    """Not always: a pass for several tokens of a sequence rounds otherwise than one for one."""
    replayed = []
    replay = StepGraphs.replay
    monkeypatch.setattr(
        StepGraphs, "replay", lambda self, shape, *more: (replayed.append(self), replay(self, shape, *more))[1]
    )
    with torch.device("cuda"):
        model = Decoder(SHAPE)
    model = model.initialize(0).to("cuda", torch.bfloat16).eval()
    config = EngineConfig(
        sequences=16,
        memory=0.5,
        draft=Model(source="itself", tokens=4),
        controller=controller,
        verifier=verifier,
        loop=loop,
        check=True,
    )
    predictor = predictor_of(model) if config.controller.predicts else None
    engine = build_engine(model, config, draft=copy.deepcopy(model), predictor=predictor)
    replayed.clear()
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
    assert now.accepted_tokens > 0.8 * now.drafted_tokens > 0
    runners = {"target": engine.executor, "draft": engine.steps.speculation.model.runner}
    kinds = {
        id(graphs): (who, kind)
        for who, runner in runners.items()
        for captured in runner.passes.captured.values()
        for kind, graphs in captured._asdict().items()
    }
    told = {kinds[id(each)] for each in replayed}
    assert {who for who, _ in told} == {"target", "draft"}
    if verifier == "exact_match":
        assert ("target", "windows") in told
        # Nobody looks at what is drafted before all of it is.
        assert (("draft", "onward") in told) == (controller == "fixed")
