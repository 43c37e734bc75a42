"""Steps with tentative tokens as CUDA graphs: the logits of the same steps queued kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.serve.run.runner import Passed, Runner
from penstock.serve.run.step import Part
from penstock.speculate.drafters.ngram import Ngram

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=6, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024, qk_norm=True
)
#: Of the root mean square of the logits: bf16 products of another number of rows are added up in another order.
TOLERANCE = 0.03


class Compared:
    """Computes each step with windows a second time without graphs, which writes the same keys and values again.

    Attributes:
        replayed: how many of those steps a graph computed.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner, self._pass_all, self.replayed = runner, runner._pass_all, 0
        runner._pass_all = self.both

    def both(self, parts: Sequence[Part], lead: int) -> list[Passed]:
        runner, captured = self._runner, self._runner._captured
        graphs, _ = captured[False]
        passed = self._pass_all(parts, lead)
        if all(part.decoding for part in parts):
            return passed
        shapes = [graphs.shape_for(part.plan) for part in parts]
        kept = [None if each.logits is None else each.logits.clone() for each in passed]
        runner._captured = {}
        queued = self._pass_all(parts, lead)
        runner._captured = captured
        for own, want in zip(kept, queued, strict=True):
            if own is not None:
                spread = (own.float() - want.logits.float()).abs().max() / want.logits.float().pow(2).mean().sqrt()
                assert spread < TOLERANCE
        self.replayed += sum(shape is not None and not shape.singles for shape in shapes)
        return passed


def test_replayed_windows_are_queued_windows():
    with torch.device("cuda"):
        model = Decoder(SHAPE)
    model = model.initialize(0).to("cuda", torch.bfloat16).eval()
    engine = build_engine(model, EngineConfig(sequences=16, cache_tokens=16384, draft=Ngram(), check=True))
    compared = Compared(engine.executor)
    for number in range(12):
        prompt = [(7 * number + place % (3 + number)) % SHAPE.vocabulary for place in range(60 + number)]
        sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        engine.add(Request(str(number), prompt, sampling))
    lengths: dict[str, int] = {}
    while engine.busy:
        for delta in engine.step():
            lengths[delta.id] = lengths.get(delta.id, 0) + len(delta.tokens)
    assert set(lengths.values()) == {30}
    assert compared.replayed > 0
