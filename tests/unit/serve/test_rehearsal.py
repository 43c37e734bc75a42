"""What an engine does before it serves."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from penstock.models.decoder import Decoder
from penstock.ops.linear import FEW
from penstock.serve import rehearsal
from penstock.serve.build import build_engine, build_runner, build_runners
from penstock.serve.choose.sampling import MOST_LOGPROBS
from penstock.serve.config import EngineConfig
from penstock.serve.engine import prompt_clock
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.executor import Executor
from penstock.serve.rehearsal import (
    Timing,
    rehearsal_blocks,
    rehearse_drafts,
    rehearse_first_uses,
    rehearse_largest_steps,
    rehearse_prompts,
)
from penstock.serve.run.draft import DraftModel
from penstock.speculate.controllers.contract import Seen
from penstock.testing.serve_model import SHAPE, draft_of, small_model

CPU = torch.device("cpu")


def batches_of(executor: Executor) -> list[Batch]:
    """What it launches from now on."""
    launch, found = executor.launch, []
    executor.launch = lambda batch: (found.append(batch), launch(batch))[-1]
    return found


@pytest.mark.parametrize("batching", ["sarathi", "batchllm", "orca"])
def test_a_rehearsal_meets_a_full_step_and_each_small_number_of_rows(batching):
    config = EngineConfig(batching=batching, tokens=64, sequences=8, cache_tokens=400, check=True)
    engine = build_engine(small_model(), config)
    launched = batches_of(engine.executor)
    rehearse_first_uses(config, engine.executor)
    met = [(batch.tokens, sum(entry.scored for entry in batch.entries)) for batch in launched]
    assert (64, 1) in met
    assert {(rows + 1, rows) for rows in range(1, FEW + 1)} <= set(met)
    assert engine.memory.pool.held == 0 and not engine.busy


def test_first_uses_are_of_drafts_too_whatever_would_be_asked_for():
    config = EngineConfig(tokens=64, sequences=8, cache_tokens=400, draft="ngram", check=True)
    assert config.controller.goes_by_time
    engine = build_engine(small_model(), config)
    launched = batches_of(engine.executor)
    rehearse_first_uses(config, engine.executor)
    scored = {entry.scored for batch in launched for entry in batch.entries}
    assert {1, 1 + config.draft.most} <= scored


@pytest.mark.parametrize("tokens", [64, 4 * SHAPE.context])
def test_a_model_that_drafts_has_met_a_long_prompt_of_which_one_token_is_scored(tokens):
    """Also where the longest prompt is as long as a text can be."""
    draft = {"name": "model", "source": "a model", "tokens": 5}
    config = EngineConfig(tokens=tokens, sequences=8, cache_tokens=8 * SHAPE.context, draft=draft, check=True)
    runner, drafting = build_runners(small_model(), config, draft_of(small_model()))
    assert isinstance(drafting, DraftModel)
    plan, met = drafting.runner.plan, []
    drafting.runner.plan = lambda batch: (met.extend(batch.entries if len(batch.entries) == 1 else []), plan(batch))[-1]
    rehearse_first_uses(config, runner, drafting)
    assert any(entry.scored == 1 and entry.count > config.draft.most + 2 for entry in met)


@pytest.mark.parametrize("enough", [0.0, 60.0])
@pytest.mark.parametrize("draft", [{"name": "ngram", "tokens": 5}, {"name": "model", "source": "a model", "tokens": 5}])
def test_what_drafts_cost_is_told_of_each_crowd_as_long_as_that_is_soon_done(draft, enough, monkeypatch):
    monkeypatch.setattr(rehearsal, "ENOUGH", enough)
    config = EngineConfig(tokens=64, sequences=8, cache_tokens=800, draft=draft, check=True)
    engine, told = build_engine(small_model(), config, draft=draft_of(small_model())), []
    assert engine.steps.speculation is not None
    monkeypatch.setattr(engine.steps.speculation, "expect", lambda *given: told.append(given))
    launched = batches_of(engine.executor)
    rehearse_drafts(config, engine)
    lengths = (0, 1, 2, 3, 5)
    crowds = (1, 2, 4, 8) if enough else (1,)
    lengths = lengths if enough else lengths[:1]
    assert {each[:2] for each in told} == set(itertools.product(crowds, lengths))
    assert set(Counter(each[:2] for each in told).values()) == {1}
    assert all(0 < seconds < 10 for *_, seconds in told)
    met = {(len(batch.entries), entry.scored) for batch in launched for entry in batch.entries}
    assert {(crowds[-1], 1 + length) for length in lengths} <= met
    # Prompts of their own: what two have in common one of them would not compute.
    largest = [batch for batch in launched if len(batch.entries) == crowds[-1]]
    assert {len({entry.sequence.tokens[0] for entry in batch.entries}) for batch in largest} == {crowds[-1]}
    assert engine.memory.pool.held == 0 and not engine.busy and engine.snapshot().steps == 0


def seen(sequences: int, ahead: int, seconds: float | None, prompts: int = 0) -> Seen:
    return Seen(sequences, prompts, ahead, [ahead] * sequences, [0] * sequences, 0.0, seconds, 9, 0)


def test_steps_that_are_timed_are_those_of_one_length_without_prompts():
    control = Timing()
    control.length = 2
    kept = [seen(3, 2, 0.5), seen(1, 2, 0.25)]
    for each in (kept[0], seen(3, 1, 0.1), seen(3, 2, 0.1, prompts=4), seen(3, 2, None), kept[1]):
        control.learn(each)
    assert control.seen == kept


def test_what_is_told_is_the_least_of_what_such_a_crowd_took(monkeypatch):
    """The first step of its kind also takes what happens at a first use."""
    config = EngineConfig(tokens=64, sequences=4, cache_tokens=400, draft={"name": "ngram", "tokens": 1}, check=True)
    engine, told = build_engine(small_model(), config), []
    assert engine.steps.speculation is not None
    monkeypatch.setattr(engine.steps.speculation, "expect", lambda *given: told.append(given))
    taken = itertools.chain([5.0, 3.0], itertools.repeat(4.0))

    def learn(self: Timing, each: Seen) -> None:
        if not each.prompts and each.ahead == self.length:
            # And one as where others came meanwhile.
            self.seen += [each._replace(seconds=next(taken)), each._replace(sequences=3, seconds=0.1)]

    monkeypatch.setattr(Timing, "learn", learn)
    monkeypatch.setattr(rehearsal, "ENOUGH", 0.0)
    rehearse_drafts(config, engine)
    assert told[0] == (1, 0, 3.0)


def test_nothing_is_told_where_all_is_recorded(tmp_path):
    config = EngineConfig(cache_tokens=400, draft="ngram", check=True)
    engine = build_engine(small_model(), config)
    launched = batches_of(engine.executor)
    rehearse_drafts(config.model_copy(update={"record": tmp_path / "all"}), engine)
    assert not launched
    rehearse_drafts(config, engine)
    assert launched


def test_who_does_not_go_by_time_is_told_nothing():
    for options in ({}, {"draft": "ngram", "controller": "fixed"}):
        engine = build_engine(small_model(), EngineConfig(cache_tokens=400, **options))
        launched = batches_of(engine.executor)
        rehearse_drafts(EngineConfig(**options), engine)
        assert not launched


@pytest.mark.parametrize(("block_size", "context"), [(1, 16), (16, 16), (16, 2)])
def test_an_engine_for_one_short_sequence_at_a_time_can_rehearse(block_size, context):
    config = EngineConfig(tokens=2, sequences=1, context=context, cache_tokens=64, block_size=block_size)
    engine = build_engine(small_model(), config)
    rehearse_largest_steps(config, engine.executor)
    rehearse_first_uses(config, engine.executor)
    assert engine.memory.pool.held == 0 and not engine.busy


@pytest.mark.parametrize("options", [{}, {"block_size": 4, "draft": "ngram"}, {"loop": "plain", "deterministic": True}])
def test_the_largest_steps_have_all_sequences_all_tokens_and_all_wishes(options):
    config = EngineConfig(tokens=48, sequences=8, check=True, **options)
    blocks = rehearsal_blocks(config, CPU, SHAPE.context)
    config = config.model_copy(update={"cache_tokens": blocks * config.block_size})
    runner = build_runner(copy.deepcopy(small_model()), config)  # a deterministic engine replaces its layers
    launched = batches_of(runner)
    rehearse_largest_steps(config, runner)
    preempted = [each for each in launched for entry in each.entries if entry.sequence.preempted]
    assert not preempted
    most = max(launched, key=lambda batch: (batch.tokens, len(batch.entries)))
    assert most.tokens == 48
    assert max(sum(entry.scored for entry in batch.entries) for batch in launched) >= min(7 * config.rows, 40)
    assert any(entry.prompt_logprobs for batch in launched for entry in batch.entries)
    for entry in most.entries:
        asked = entry.sequence.sampling
        assert asked.penalized and asked.logit_bias and asked.top_p < 1 and asked.logprobs == MOST_LOGPROBS


@pytest.mark.parametrize("draft", [{}, {"draft": {"name": "ngram", "tokens": 3}}], ids=["plain", "drafts"])
def test_what_a_prompt_takes_is_that_of_the_second_that_is_computed_whole(draft, monkeypatch):
    config = EngineConfig.model_validate({"tokens": 300, "sequences": 2, "cache_tokens": 800, "check": True, **draft})
    executor = build_runner(Decoder(SHAPE.model_copy(update={"context": 400})).initialize(0).eval(), config)
    batches, now, launch = batches_of(executor), [0.0], executor.launch
    monkeypatch.setattr(prompt_clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow_at_first(batch: Batch) -> object:
        now[0] += batch.tokens * (10.0 if len(batches) == 0 else 0.5)
        return launch(batch)

    monkeypatch.setattr(executor, "launch", slow_at_first)
    assert rehearse_prompts(config, executor).seconds == pytest.approx(0.5)
    assert [batch.tokens for batch in batches] == [300, 300], "nothing of the second was cached"
