"""Drafted tokens go through a pipeline in runs of their own, and those that cannot be reached any more are given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from divided_ranks import example, together
from penstock.core.randomness import numpy_generator
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.ranks.runs import runs_of
from penstock.speculate.drafters.pipelined import Pipelined
from penstock.testing.transformers_peer import prompt, randomize

CONFIG = EngineConfig.model_validate(
    {"tokens": 24, "sequences": 4, "block_size": 4, "cache_tokens": 120, "check": True}
)

LENGTH = 20

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    {"temperature": 0, "presence_penalty": 0.5},
)


def drafting(stages: int, run: int = 2, **options: Any) -> EngineConfig:
    draft = {"name": "pipelined", "tokens": 6, "run": run}
    return EngineConfig.model_validate(
        {
            **CONFIG.model_dump(exclude_unset=True),
            "pipeline_parallel": stages,
            "draft": draft,
            "controller": "fixed",
            **options,
        }
    )


class Foretold:
    """Drafts what follows in one of the ``answers``, but for tokens that are wrong: a share of them, at random."""

    def __init__(self, tokens: list[int], answers: list[list[int]], right: float) -> None:
        self._tokens, self._answers, self._right = list(tokens), answers, right

    def extend(self, tokens: list[int]) -> None:
        self._tokens += tokens

    def propose(self, most: int) -> list[int]:
        own = len(self._tokens)
        answer = next((each for each in self._answers if each[:own] == self._tokens), [])
        luck = numpy_generator(own, "tests/foretold").random(most)
        drafted = zip(answer[own : own + most], luck.tolist(), strict=False)
        return [token if lucky < self._right else (token + 1) % 61 for token, lucky in drafted]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("runs") / "llama"
    hub.save(randomize(Decoder(example("llama"))), where, family="llama")
    return where


def said(engine: Engine, count: int = 3) -> dict[str, Any]:
    """What ``engine`` answers to so many prompts, with log-probabilities; how many tokens were accepted; and what the
    cache has, at the end, of the first one, in the layers that are here."""
    answers: dict[str, list[int]] = {}
    told: dict[str, list[float]] = {}
    for row, given in enumerate(prompt(count, 6).tolist()):
        params = {**SAMPLINGS[row], "max_tokens": LENGTH, "ignore_eos": True, "logprobs": 0}
        engine.add(Request(str(row), given, SamplingParams.model_validate(params), keep=row == 0))
    while engine.busy:
        for delta in engine.step():
            answers.setdefault(delta.id, []).extend(delta.tokens)
            rows = [] if delta.logprobs is None else delta.logprobs
            told.setdefault(delta.id, []).extend(each.logprob for each in rows)
    now, held = engine.snapshot(), engine.requests.parent("0", 0).held
    assert held is not None
    length = 6 + LENGTH - 1
    slots = [held.blocks[place // 4] * 4 + place % 4 for place in range(length)]
    last = engine.executor.cache.read(torch.tensor(slots))[0][-1]
    engine.close()
    return {
        "answers": [answers[row] for row in sorted(answers)],
        "logprobs": [told[row] for row in sorted(told)],
        "blocks": len(held.blocks),
        "free": now.blocks - now.held,
        "accepted": now.accepted_tokens,
        "keys": last.tolist(),
    }


def clean(folder: Path, count: int = 3) -> dict[str, Any]:
    """The same of one device that drafts nothing."""
    return said(build_engine(hub.load_for_inference(folder).eval(), CONFIG), count)


def drafted_from(answers: list[list[int]], right: float, monkeypatch: pytest.MonkeyPatch, count: int = 3) -> None:
    """Lets ``pipelined`` draft these answers."""
    whole = [given + answer for given, answer in zip(prompt(count, 6).tolist(), answers, strict=True)]
    monkeypatch.setattr(Pipelined, "start", lambda self, tokens: Foretold(tokens, whole, right))


@pytest.mark.parametrize(("stages", "run", "right"), [(2, 2, 0.0), (2, 2, 0.7), (2, 6, 1.0), (3, 1, 0.7), (3, 3, 1.0)])
def test_tokens_and_cache_are_those_of_a_clean_run_at_any_acceptance(folder, monkeypatch, stages, run, right):
    wanted = clean(folder)
    drafted_from(wanted["answers"], right, monkeypatch)
    (first, *_) = together(stages, folder, drafting(stages, run), said)
    found = first.get("returned")
    assert found is not None, first
    assert found["answers"] == wanted["answers"]
    assert (found["blocks"], found["free"]) == (wanted["blocks"], wanted["free"])
    assert (found["accepted"] > 0) == (right > 0)
    for mine, theirs in zip(found["logprobs"], wanted["logprobs"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    np.testing.assert_allclose(found["keys"], wanted["keys"], atol=1e-4)


def steps_of(engine: Engine, told: list[str]) -> None:
    """Notes in ``told`` what the other ranks are told."""
    tell = engine.executor.ranks.tell

    def noted(what: str, *arguments: Any) -> None:
        told.append(what)
        tell(what, *arguments)

    engine.executor.ranks.tell = noted


@pytest.mark.parametrize(("right", "every"), [(0.0, True), (1.0, False)])
def test_runs_behind_a_wrong_token_are_given_up_at_once_and_no_others(folder, monkeypatch, right, every):
    wanted = clean(folder, 1)
    drafted_from(wanted["answers"], right, monkeypatch, 1)

    def act(engine: Engine) -> list[int]:
        told: list[str] = []
        steps_of(engine, told)
        said(engine, 1)
        return [told.count("execute"), told.count("skip")]

    steps, skipped = together(3, folder, drafting(3), act)[0]["returned"]
    # Each step has drafts but the last token's.
    assert skipped == (steps - 1 if every else 0)
    assert (steps == LENGTH) == every


def test_runs_are_cut_so_that_each_sees_what_one_pass_would(folder):
    """Row by row: the same token, position and slot, and as many tokens before it."""
    engine = build_engine(hub.load_for_inference(folder).eval(), drafting(1))
    steps = []
    plan = engine.executor.plan
    engine.executor.plan = lambda batch: steps.append(plan(batch)) or steps[-1]
    answers = [[*given, *range(9)] for given in prompt(3, 6).tolist()]
    started = Pipelined.start
    try:
        Pipelined.start = lambda self, tokens: Foretold(tokens, [each + [5] * 40 for each in answers], 1.0)
        said(engine)
    finally:
        Pipelined.start = started
    cut = 0
    for step in steps:
        runs = runs_of(step, 2, 2)
        assert len(runs) <= 3
        cut += len(runs) > 1
        (part,) = step.parts
        assert sorted(seen(part)) == sorted(row for run in runs for row in seen(run))
        assert sum(len(run.scored) for run in runs) == len(part.scored)
    assert cut or not any(step.asked.window is not None for step in steps)


def seen(part: Any) -> list[tuple[int, ...]]:
    """Of each row its token, position and slot, how many tokens it sees, and the blocks in which these are."""
    rows = []
    for own, (start, end) in enumerate(zip(part.plan.starts[:-1].tolist(), part.plan.starts[1:].tolist(), strict=True)):
        for row in range(start, end):
            length = int(part.plan.lengths[own]) - (end - 1 - row)
            blocks = part.plan.tables[own, : -(-length // 4)].tolist()
            scored = int(row in part.scored)
            rows.append((*part.inputs[[0, 2], row].tolist(), int(part.plan.slots[row]), length, scored, *blocks))
    return rows


def test_on_one_device_all_is_verified_in_one_run(folder, monkeypatch):
    wanted = clean(folder)
    drafted_from(wanted["answers"], 0.7, monkeypatch)
    engine = build_engine(hub.load_for_inference(folder).eval(), drafting(1))
    assert said(engine)["answers"] == wanted["answers"]
