"""Two models on one set of tables: what is in the caches after drafts were rejected, and what the second one knows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import HeadModule
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Entry
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Request
from penstock.serve.opening import load_draft
from penstock.serve.run.draft import Coverage
from penstock.speculate.contract import Drafter
from penstock.speculate.drafters.head import Head
from penstock.speculate.drafters.model import Model
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.serve_model import SHAPE, draft_of, head_of, small_model

PREFIX = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def texts(engine: Engine) -> list[list[int]]:
    """What the engine has made of some prompts, greedily and not."""
    found = {}
    for number in range(6):
        prompt = [*PREFIX[: 4 + number], number]
        found[str(number)] = prompt[:]
        engine.add(
            Request(str(number), prompt, SamplingParams(temperature=number % 2, seed=1, max_tokens=22, ignore_eos=True))
        )
    while engine.busy:
        for delta in engine.step():
            found[delta.id] += delta.tokens
    return list(found.values())


def contents(engine: Engine, text: list[int]) -> torch.Tensor:
    """Keys and values of the blocks in which the prefix tree has the beginning of ``text``."""
    blocks = engine.memory.pool.match(text, len(text))
    return engine.executor.cache._memory[:, blocks].clone()


def drafting(drafter: Drafter, noise: float) -> Decoder | HeadModule:
    """What drafts for the small model, and is sometimes wrong."""
    return head_of(small_model()) if drafter.head else draft_of(small_model(), noise)


@pytest.mark.parametrize("drafter", [Ngram(shortest=1), Model(source="a model"), Head(source="a head")])
def test_blocks_after_rejected_drafts_are_those_of_a_clean_run(drafter):
    sizes = {"sequences": 4, "tokens": 64, "block_size": 4, "cache_tokens": 800, "check": True}
    engines = []
    for options in ({}, {"draft": drafter, "controller": "fixed"}):
        config = EngineConfig(deterministic=True, **sizes, **options)
        # A deterministic engine replaces its model's layers.
        engines.append(build_engine(copy.deepcopy(small_model()), config, draft=drafting(drafter, 0.2)))
    clean, drafted = engines
    wanted, found = (texts(engine) for engine in engines)
    assert found == wanted
    now = drafted.snapshot()
    assert 0 < now.accepted_tokens < now.drafted_tokens
    for text in found:
        held = contents(drafted, text)
        assert held.shape[1] >= (len(text) - 6) // 4  # of the last tokens nobody needs keys
        assert torch.equal(held, contents(clean, text))


@pytest.mark.parametrize("drafter", [Ngram(shortest=1), Model(source="a model"), Head(source="a head")])
def test_the_prefix_tree_knows_nothing_but_texts(drafter):
    config = EngineConfig(
        draft=drafter, controller="fixed", sequences=4, tokens=32, block_size=2, cache_tokens=200, check=True
    )
    engine = build_engine(small_model(), config, draft=drafting(drafter, 0.3))
    found = texts(engine)
    assert engine.snapshot().accepted_tokens < engine.snapshot().drafted_tokens
    pool = engine.memory.pool
    known = {block for text in found for block in pool.match(text, len(text))}
    assert known == set(pool._nodes)


@given(st.data())
def test_coverage_says_what_was_computed_last(data):
    """Beside a book of single slots: which version of its token the cache of the drafting model has."""
    blocks, size = 6, 3
    sampling = SamplingParams()
    coverage, nobody = Coverage(blocks, size), Sequence(Request("", [0], sampling), 0, sampling, [0], 1, 0)
    target, draft = np.zeros((blocks, size), int), np.full((blocks, size), -1)
    table = np.array(data.draw(st.permutations(range(4))))
    length = 0
    for version in range(1, data.draw(st.integers(2, 13))):
        start = data.draw(st.integers(0, min(length, 4 * size - 1)))
        end = data.draw(st.integers(start + 1, min(start + 5, 4 * size)))
        for place in range(start, end):
            target[table[place // size], place % size] = version
        coverage.overwrite([Entry(nobody, 1, start, end - start, 0)], np.stack([table + 1, table]))
        length = max(end, start)
        known = next(
            (p for p in range(start) if draft[table[p // size], p % size] != target[table[p // size], p % size]), start
        )
        assert coverage.lengths(table[None], np.array([start])) == [known]
        if data.draw(st.booleans()):
            for place in range(known, end):
                draft[table[place // size], place % size] = target[table[place // size], place % size]
            coverage.extend(table, known, end)


def test_a_vocabulary_that_differs_is_refused_with_both_sizes(tmp_path):
    folder = hub.resolve("python-6m")
    tokenizer = hub.load_tokenizer(folder)
    other = tmp_path / "other"
    hub.save(small_model(), other)
    with pytest.raises(
        UsageError, match=f"{SHAPE.vocabulary} tokens.* one of {hub.read_config(folder).vocabulary:,}"
    ) as raised:
        load_draft(str(other), folder, tokenizer, torch.device("cpu"), torch.float32)
    assert "ngram" in raised.value.hint


def test_a_sequence_longer_than_the_drafting_model_s_context_is_drafted_no_more():
    short = draft_of(small_model(), 0.0)
    short.config = SHAPE.model_copy(update={"context": 24})
    config = EngineConfig(draft=Model(source="a model"), controller="fixed", sequences=2, cache_tokens=400, check=True)
    engine = build_engine(small_model(), config, draft=short)
    engine.add(Request("1", PREFIX, SamplingParams(temperature=0, max_tokens=40)))
    told: list[int] = []
    while engine.busy:
        for delta in engine.step():
            told += delta.tokens
            if len(PREFIX) + len(told) - len(delta.tokens) > 24:
                assert not delta.drafted
    assert len(told) == 40
    assert engine.snapshot().accepted_tokens == engine.snapshot().drafted_tokens > 8
