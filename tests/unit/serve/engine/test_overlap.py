"""Who waits for the host, and who goes on meanwhile."""

from __future__ import annotations

import pytest
import torch

from penstock.models import hub
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.grammar import Grammars
from penstock.serve.choose.sampling import Grammar, SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.momentum import Momentum
from penstock.serve.messages import Request

#: Tokens of an answer.
MOST = 12


@pytest.mark.parametrize(
    "waiting",
    [{}, {"grammar": Grammar(regex="[a-z]{200}")}, {"rule": Momentum()}, {"bad_words": ((5, 6),)}],
    ids=["none", "grammar", "momentum", "bad_words"],
)
def test_all_steps_of_four_are_overlapped_whatever_the_fifth_waits_for(waiting):
    """A step is overlapped if it is launched while the one before it is not published: all of the four but the first,
    which computes their prompts."""
    tokenizer = hub.load_tokenizer("python-1m")
    ends = frozenset({tokenizer.eos_token_id})
    given = {"tokens": 64, "sequences": 8, "block_size": 4, "cache_tokens": 600, "loop": "overlapped", "check": True}
    config = EngineConfig.model_validate({"attention": Reference(), **given})
    model = hub.load("python-1m", dtype=torch.float32).eval()
    engine = build_engine(model, config, ends, grammars=Grammars(tokenizer, len(tokenizer), ends))
    greedy = SamplingParams(temperature=0, max_tokens=MOST, ignore_eos=True)
    for number in range(5):
        sampling = greedy.model_copy(update=waiting) if number == 0 else greedy
        engine.add(Request(str(number), [20 + number, 30, 40], sampling))
    launch, publish = engine.steps.launch, engine.steps.publish
    queued, overlapped = 0, dict.fromkeys(map(str, range(5)), 0)

    def launched(batch):
        nonlocal queued
        for entry in batch.entries:
            overlapped[entry.sequence.request.id] += queued > 0
        queued += 1
        return launch(batch)

    def published(batch):
        nonlocal queued
        queued -= 1
        return publish(batch)

    engine.steps.launch, engine.steps.publish = launched, published
    told = dict.fromkeys(overlapped, 0)
    while engine.busy:
        for delta in engine.step():
            told[delta.id] += len(delta.tokens)
    assert set(told.values()) == {MOST}
    assert [overlapped[str(number)] for number in range(1, 5)] == [MOST - 1] * 4
