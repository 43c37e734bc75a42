"""Heads draft before the target's step copies the blocks that a sequence may not write to: what they write must not be
copied."""

from __future__ import annotations

import pytest

from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_runners
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.speculate.drafters.head import Head
from penstock.testing.serve_model import small_head, small_model

PROMPT = [25, 24, 15, 13, 28, 25, 43, 12, 48, 11, 31, 29, 44, 40, 43, 2, 40, 12, 25, 28, 40, 33, 6, 47]


def told(drafter: Head | None) -> tuple[list[int], list[float], bool]:
    """What follows PROMPT, and its log-probabilities. With a ``drafter``, the third token is taken back once it is
    there, in a cache with few free blocks: tells whether a step then copied from a block that it wrote to."""
    drafts = {} if drafter is None else {"draft": drafter, "controller": "fixed"}
    config = EngineConfig(attention=Reference(), block_size=2, cache_tokens=34, sequences=2, check=True, **drafts)
    runner, drafting = build_runners(small_model(), config, None if drafter is None else small_head(drafter))
    engine = Engine(config, runner, draft=drafting)
    engine.add(Request("a", PROMPT, SamplingParams(temperature=0, max_tokens=8, logprobs=1)))
    engine.add(Request("beside", [42], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)))
    said, reused, cut = list[tuple[int, float]](), False, False
    while engine.busy:
        mine = [delta for delta in engine.step() if delta.id == "a"]
        said += [(each.token, each.logprob) for delta in mine for each in delta.logprobs or ()]
        batch = engine.steps.last
        sources = {source for source, _ in batch.copies}
        reused |= any(not sources.isdisjoint(batch.tables[entry.slot].tolist()) for entry in batch.entries)
        if drafter is not None and len(said) == 3 and not cut:
            engine.truncate("a", len(PROMPT) + 2)
            said, cut = said[:2], True
    return [token for token, _ in said], [logprob for _, logprob in said], reused


def test_what_a_head_drafts_is_not_copied():
    """A block that is copied is free then, and may be the next one that is taken."""
    tokens, logprobs, _ = told(None)
    drafted, own, reused = told(Head(source="runs/drafter", tokens=4))
    assert reused
    assert drafted == tokens
    assert own == pytest.approx(logprobs, abs=1e-4)
