"""The books of a step: the short way of those that decode, and what drafts are told before they are asked."""

from __future__ import annotations

import random

import pytest

from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Entry
from penstock.serve.engine.room import StepRoom
from penstock.serve.messages import Request
from penstock.speculate.drafters.ngram import NgramDraft
from penstock.testing.serve_simulation import simulated_engine

KINDS = {
    "plain": {},
    "short of blocks": {"cache_tokens": 160},
    "compressed": {"kv": {"name": "sink_window", "budget": 16}},
    "drafting": {"draft": "ngram", "controller": {"name": "fixed", "length": 2}},
}


def course(kind: str, seed: int) -> list[list[tuple[object, ...]]]:
    """The entries of each step for some requests that come, are forked and aborted."""
    draw, options = random.Random(seed), {"cache_tokens": 512, **KINDS[kind]}
    engine = simulated_engine(
        EngineConfig.model_validate({"tokens": 48, "sequences": 8, "block_size": 8, "check": True, **options})
    )
    found, number = [], 0
    for _ in range(120):
        if draw.random() < 0.3:
            # Beginnings are shared, so that blocks are found and frozen.
            prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9][: draw.randrange(1, 10)] + [draw.randrange(10)] * draw.randrange(12)
            told = draw.choice([None, None, 1])
            sampling = SamplingParams(
                temperature=0, max_tokens=draw.randrange(1, 30), n=draw.choice([1, 1, 2]), prompt_logprobs=told
            )
            engine.add(Request(str(number), prompt, sampling))
            number += 1
        running = [each for each in engine.memory.running if each.finish is None]
        if running and draw.random() < 0.1:
            parent = draw.choice(running)
            child = Request(f"fork {len(found)}", list(parent.tokens), SamplingParams(temperature=0, max_tokens=9))
            engine.fork(parent.request.id, child, parent.index)
        if running and draw.random() < 0.05:
            engine.abort(draw.choice(running).request.id)
        engine.step()
        found.append([told_of(entry) for entry in engine.steps.last.entries])
    assert engine.snapshot().output_tokens > 100
    return found


def told_of(entry: Entry) -> tuple[object, ...]:
    """What an entry says, with its sequence by name."""
    fields = [getattr(entry, name) for name in Entry.__struct_fields__ if name != "sequence"]
    return entry.sequence.request.id, entry.sequence.index, *fields


@pytest.mark.parametrize("kind", KINDS)
def test_the_short_way_takes_what_the_long_way_does(monkeypatch, kind):
    short = [course(kind, seed) for seed in range(3)]
    went = []
    monkeypatch.setattr(StepRoom, "_step", lambda room, sequence, budget: went.append(sequence) or 0)
    assert [course(kind, seed) for seed in range(3)] == short
    assert len(went) > 100


def test_a_draft_is_told_all_tokens_before_it_is_asked_and_not_sooner(monkeypatch):
    texts, asked = {}, []

    def extended(draft: NgramDraft, tokens: list[int]) -> None:
        texts.setdefault(id(draft), []).extend(tokens)

    def proposed(draft: NgramDraft, most: int) -> list[int]:
        asked.append(list(texts[id(draft)]))
        return []

    monkeypatch.setattr(NgramDraft, "extend", extended)
    monkeypatch.setattr(NgramDraft, "propose", proposed)
    config = {"cache_tokens": 512, "block_size": 8, "draft": "ngram", "controller": {"name": "fixed", "length": 2}}
    engine = simulated_engine(EngineConfig.model_validate(config))
    prompt = [5, 6, 7]
    engine.add(Request("a", prompt, SamplingParams(temperature=0, max_tokens=12)))
    (sequence,) = engine.requests.of("a")
    while engine.busy:
        engine.step()
    assert asked == [[*prompt, *[0] * count] for count in range(11)]  # also behind the prompt, with its last piece
    # Nothing is drafted for the last token, and nobody asks behind it.
    assert texts[id(sequence.draft)] == [*prompt, *[0] * 10]


def test_what_others_learn_from_is_told_to_the_end():
    config = {"cache_tokens": 512, "block_size": 8, "draft": "suffix", "controller": {"name": "fixed", "length": 1}}
    engine = simulated_engine(EngineConfig.model_validate(config))
    engine.add(Request("a", [5, 6, 7], SamplingParams(temperature=0, max_tokens=6)))
    (first,) = engine.requests.of("a")
    while engine.busy:
        engine.step()
    assert first.told == len(first.tokens) == 9
