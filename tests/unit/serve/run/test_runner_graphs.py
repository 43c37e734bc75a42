"""A warmed-up runner answers like a cold one, with stand-ins for graphs that compute the pass again."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.ops.paged.contract import StepShape
from penstock.ops.paged.reference import ReferenceCache
from penstock.serve.build import build_engine, build_runner
from penstock.serve.choose.asked import Asked
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.choose.sampler import Drawn
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.policies.h2o import HeavyHitters
from penstock.serve.messages import Delta, Request
from penstock.serve.run.runner import Passed, Runner
from penstock.serve.run.step import Part
from penstock.speculate.controllers.fixed import Fixed
from penstock.speculate.drafters.model import Model
from penstock.speculate.drafters.ngram import Ngram
from penstock.speculate.verifiers.accept_residual import AcceptResidual
from penstock.speculate.verifiers.exact_match import ExactMatch
from penstock.testing.rehearsed_graphs import RehearsedGraphs
from penstock.testing.serve_model import SHAPE, draft_of, small_model
from tiny_adapters import written

CONFIG = EngineConfig(attention="reference", cache_tokens=4000, sequences=8, tokens=40, check=True)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device would do."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(ReferenceCache, "fix", lambda *_: True)
    monkeypatch.setattr("penstock.serve.run.passes.StepGraphs", RehearsedGraphs)


@pytest.fixture
def warm(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose steps are all replayed, those too long for it aside."""
    monkeypatch.setattr("penstock.serve.run.runner.chosen", lambda *_: 10**9)
    engine = build_engine(small_model(), CONFIG)
    engine.executor.compile(CONFIG.tokens)
    engine.executor.capture()
    return engine


def news(engine: Engine, kinds: list[dict[str, Any]], adapters: tuple[str, ...] = ("",)) -> Iterator[Delta]:
    """Of requests that arrive a few at a time, each of the next of the ``kinds`` and ``adapters``."""
    waiting = [
        Request(
            str(place),
            [1 + (place * step) % (SHAPE.vocabulary - 1) for step in range(3 + 2 * place)],
            SamplingParams(max_tokens=9 + place, ignore_eos=True, seed=place, **kinds[place % len(kinds)]),
            adapter=adapters[place % len(adapters)],
        )
        for place in range(12)
    ]
    while waiting or engine.busy:
        for request in waiting[:2]:
            engine.add(request)
        waiting = waiting[2:]
        yield from engine.step()


def answers(engine: Engine, kinds: list[dict[str, Any]], adapters: tuple[str, ...] = ("",)) -> dict[str, list[int]]:
    """The tokens of such requests."""
    told: dict[str, list[int]] = {}
    for delta in news(engine, kinds, adapters):
        told.setdefault(delta.id, []).extend(delta.tokens)
    return told


def logprobs(engine: Engine, kinds: list[dict[str, Any]]) -> dict[str, list[TokenLogprobs]]:
    """Those of the tokens of such requests."""
    told: dict[str, list[TokenLogprobs]] = {}
    for delta in news(engine, kinds):
        assert (delta.logprobs is None) == ("logprobs" not in kinds[int(delta.id) % len(kinds)])
        told.setdefault(delta.id, []).extend(delta.logprobs or [])
    return told


PLAIN: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.8}, {"temperature": 1.3}]
SPECIAL: list[dict[str, Any]] = [
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.7, "presence_penalty": 1.0},
    {"temperature": 0, "logit_bias": {3: 2.0}},
]


@pytest.mark.parametrize("kinds", [PLAIN[:1], PLAIN, [*PLAIN, {"temperature": 0.9, "logprobs": 2}], [*PLAIN, *SPECIAL]])
def test_answers_are_those_of_a_cold_runner(warm: Engine, kinds: list[dict[str, Any]]) -> None:
    replayed = set()
    for graphs in warm.executor.passes.captured[False]:
        replay = graphs.replay
        graphs.replay = lambda shape, *rest, replay=replay: (replayed.add(shape), replay(shape, *rest))[1]
    assert answers(warm, kinds) == answers(build_engine(small_model(), CONFIG), kinds)
    assert any(shape.others for shape in replayed)
    assert any(not shape.others for shape in replayed)
    assert any(shape.singles > 2 for shape in replayed)


def test_caches_that_are_compressed_are_those_of_a_cold_runner(stand_ins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.serve.run.runner.chosen", lambda *_: 10**9)
    config = CONFIG.model_copy(update={"kv": HeavyHitters(budget=0.4, every=4)})
    warm = build_engine(small_model(), config)
    warm.executor.compile(config.tokens)
    warm.executor.capture()
    assert answers(warm, PLAIN) == answers(build_engine(small_model(), config), PLAIN)
    assert warm.snapshot().dropped_tokens > 50


def test_steps_with_adapters_have_graphs_of_their_own(stand_ins, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A step in which nobody has an adapter replays one that adds nothing."""
    monkeypatch.setattr("penstock.serve.run.runner.chosen", lambda *_: 10**9)
    folders = {name: written(tmp_path / name, small_model(), seed) for seed, name in enumerate("ab")}
    config = CONFIG.model_copy(update={"adapters": folders})
    warm = build_engine(copy.deepcopy(small_model()), config)
    warm.executor.compile(config.tokens)
    warm.executor.capture()
    replayed = set()
    for adapted, pair in warm.executor.passes.captured.items():
        for place, graphs in enumerate(pair):
            replay, kind = graphs.replay, (adapted, place)
            graphs.replay = lambda *rest, replay=replay, kind=kind: (replayed.add(kind), replay(*rest))[1]
    cold = build_engine(copy.deepcopy(small_model()), config)
    assert answers(warm, PLAIN, ("", "a", "b")) == answers(cold, PLAIN, ("", "a", "b"))
    assert {(True, 0), (True, 1)} <= replayed
    replayed.clear()
    assert answers(warm, PLAIN) == answers(build_engine(small_model(), CONFIG), PLAIN)
    assert replayed == {(False, 0), (False, 1)}


def replays(runner: Runner, tokens: int) -> list[tuple[Part, StepShape | None]]:
    """The passes that ``runner`` computes from now on, as graphs where there is one, and of which shape; None where
    nothing is replayed."""
    runner.compile(tokens)
    runner.capture()
    told: list[tuple[Part, StepShape | None]] = []
    run, replayed = runner._pass, list[StepShape]()
    for graphs in runner.passes.captured[False]:
        replay = graphs.replay
        graphs.replay = lambda shape, *rest, replay=replay: (replayed.append(shape), replay(shape, *rest))[1]

    def passed(part: Part, lane: int = 0) -> Passed:
        found = run(part, lane)
        told.append((part, replayed.pop() if replayed else None))
        return found

    runner._pass = passed
    return told


@pytest.mark.parametrize("verifier", ["exact_match", "accept_residual"])
@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_all_that_is_drafted_and_verified_is_replayed(stand_ins, monkeypatch, drafter: str, verifier: str):
    """Prompts are not: their graphs are left out. Tokens are those of an engine without graphs."""
    monkeypatch.setattr("penstock.serve.run.runner.chosen", lambda *_: 0)
    draft = {"ngram": Ngram(shortest=1, tokens=4), "model": Model(source="a model", tokens=4)}[drafter]
    rule = {"exact_match": ExactMatch(), "accept_residual": AcceptResidual()}[verifier]
    config = CONFIG.model_copy(update={"draft": draft, "controller": Fixed(), "tokens": 400, "verifier": rule})

    def engine() -> Engine:
        return build_engine(small_model(), config, draft=draft_of(small_model()) if drafter == "model" else None)

    warm, cold = engine(), engine()
    own, drafted = replays(warm.executor, 400), list[tuple[Part, StepShape | None]]()
    if drafter == "model":
        drafted = replays(warm.steps.speculation.model.runner, 400)
    repeating = [{"temperature": 0}, {"temperature": 0, "logit_bias": {3: 30.0, 5: 30.0}}, {"temperature": 0.8}]
    assert answers(warm, repeating) == answers(cold, repeating)
    asking = [{"temperature": 0, "logprobs": 2}, {"temperature": 0.9, "logprobs": 0}, {"temperature": 0.5}]
    told, wanted = logprobs(warm, asking), logprobs(cold, asking)
    for mine, theirs in zip(told.values(), wanted.values(), strict=True):
        assert [(each.token, each.rank, dict(each.top)) for each in mine] == [
            (each.token, each.rank, pytest.approx(dict(each.top), abs=1e-4)) for each in theirs
        ]
    assert warm.snapshot().drafted_tokens > warm.snapshot().accepted_tokens > 20
    verified = [each for each in own if each[0].all_scored and each[0].plan.own_shape.others]
    generations = [each for each in drafted if each[0].plan.own_shape.rows <= 2 * len(each[0].plan.lengths)]
    assert len(verified) > 5 and (drafter == "ngram" or len(generations) > 20)
    for part, shape in (*verified, *generations):
        assert shape is not None, f"{part.plan.own_shape} is replayed by no graph"
        assert shape.rows <= 3 * part.inputs.shape[1] + 8
    assert any(shape.others and shape.rows > 10 for _, shape in verified)


def test_all_tokens_of_a_chain_are_drafted_at_once(stand_ins, monkeypatch):
    """Where nothing but temperature and cuts changes from one token to the next: tokens and drafts are those of passes
    that are asked for one by one."""
    monkeypatch.setattr("penstock.serve.run.runner.chosen", lambda *_: 0)
    config = CONFIG.model_copy(update={"draft": Model(source="a model", tokens=6), "tokens": 400})
    config = config.model_copy(update={"controller": Fixed(), "context": 40})
    warm, cold = (build_engine(small_model(), config, draft=draft_of(small_model(), 0.02)) for _ in range(2))
    runner = warm.steps.speculation.model.runner
    cold.steps.speculation.model.runner.onward = 0
    told, passes = replays(runner, 400), list[int]()
    go_on = runner.go_on

    def gone(batch: Batch, left: np.ndarray) -> Tensor | None:
        tokens = go_on(batch, left)
        passes.append(0 if tokens is None else len(set(left.tolist())))
        return None if tokens is None else tokens.clone()

    runner.go_on = gone
    plain = [*PLAIN, {"temperature": 0.8, "top_p": 0.9, "top_k": 7}]
    assert answers(warm, plain) == answers(cold, plain)
    assert warm.snapshot().drafted_at == cold.snapshot().drafted_at
    assert warm.snapshot().accepted_tokens == cold.snapshot().accepted_tokens > 20
    assert max(passes) > 1  # some need more than others
    alone = len(told)  # passes with prompts, and behind these
    assert passes.count(0) <= alone < len(passes)
    assert answers(warm, [*plain, *SPECIAL]) == answers(cold, [*plain, *SPECIAL])
    assert len(told) > 3 * alone


def test_what_a_graph_draws_is_what_is_told(warm: Engine) -> None:
    """Nothing is drawn a second time where all requests are plain."""
    sampler, given = warm.executor.sampler, []
    sample, choose = sampler.sample, sampler._choose
    sampler._choose = lambda *asked: (given.append("chosen"), choose(*asked))[1]
    sampler.sample = lambda *asked: (given.append("drawn" if asked[2] is not None else "not drawn"), sample(*asked))[1]
    answers(warm, PLAIN)
    assert given.count("drawn") > 10
    assert given.count("chosen") == given.count("not drawn")


def test_log_probabilities_are_told_by_graphs(warm: Engine) -> None:
    """To the last bit what is looked up in the same scores, whoever asks for how many beside others who ask for none.
    Beside a graph nothing is looked up, unless scores were changed after it."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.8, "logprobs": 3},
        {"temperature": 0},
        {"temperature": 0, "logprobs": 0, "spread": True},
        {"temperature": 1.2, "logprobs": 20, "top_p": 0.9},
    ]
    sampler, given = warm.executor.sampler, []
    sample, looked_up = sampler.sample, sampler._told

    def sampling(logits: Tensor, asked: Asked, drawn: Drawn | None, *rest: Any) -> Any:
        given.append("drawn" if drawn else "not drawn")
        found = sample(logits, asked, drawn, *rest)
        if drawn and asked.plain and found[0].logprobs is not None:
            given.append("compared")
            rows, others = (each[0].logprobs.rows for each in (found, sample(logits, asked)))
            wanted = asked.rows["alternatives"][asked.rows["alternatives"] >= 0].tolist()
            for row, most in enumerate(wanted):
                assert np.array_equal(*(each.cut(row, row + 1, most).table for each in (rows, others)))
        return found

    sampler._told = lambda *asked: (given.append("looked up"), looked_up(*asked))[1]
    sampler.sample = sampling
    found, wanted = (logprobs(engine, kinds) for engine in (warm, build_engine(small_model(), CONFIG)))
    assert given.count("compared") > 10 and ("drawn", "looked up") not in itertools.pairwise(given)
    assert [*found] == [*wanted] and any(found.values())
    for own, cold in zip(found.values(), wanted.values(), strict=True):
        assert [(each.token, each.rank, len(each.top)) for each in own] == [
            (each.token, each.rank, len(each.top)) for each in cold
        ]
        assert [each.logprob for each in own] == pytest.approx([each.logprob for each in cold], abs=1e-4)
        assert [each.entropy for each in own] == pytest.approx([each.entropy for each in cold], abs=1e-4)
    logprobs(warm, [*kinds, {"temperature": 0.7, "logprobs": 2, "presence_penalty": 1.0}])
    assert ("drawn", "looked up") in itertools.pairwise(given)


def test_the_next_start_captures_the_same_steps_and_times_none(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = iter([100, 300, 900])  # what is measured differs each time
    monkeypatch.setattr("penstock.serve.run.runner.rows_worth_replaying", lambda *_: next(measured))

    def captured(**options: Any) -> list[StepShape]:
        runner = build_runner(small_model(), CONFIG.model_copy(update=options))
        runner.compile(CONFIG.tokens)
        runner.capture()
        return runner.passes.captured[False][0].shapes

    first = captured()
    assert first and max(shape.rows for shape in first) <= 100
    assert captured() == first
    other = captured(sequences=200)
    assert max(shape.rows for shape in other) > 100
    assert captured(sequences=200) == other
    assert next(measured) == 900


def test_graphs_end_with_their_engine(warm):
    """Ranks cannot leave each other while there is one that they compute together."""
    graphs = [weakref.ref(each.decodes) for each in warm.executor.passes.captured.values()]
    assert graphs and all(each() is not None for each in graphs)
    warm.close()
    assert all(each() is None for each in graphs)


def test_who_had_graphs_has_them_again_behind_its_sleep(warm):
    warm.executor.sleep()
    assert not warm.executor.passes.captured
    warm.executor.wake()
    assert warm.executor.passes.captured
