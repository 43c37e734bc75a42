"""Searches on CUDA: a deterministic engine replays them to the same tree; a summary reads thoughts where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.search.driver import Driver, run
from penstock.search.ledger import Budget
from penstock.search.play import Play
from penstock.search.prices import Prices
from penstock.search.programs.parallel_thoughts import ParallelThoughts
from penstock.search.programs.particle import Particle
from penstock.search.programs.priority import Priority
from penstock.search.search import Search
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.testing.engine.requests import numbers
from penstock.testing.search_program import scored
from penstock.testing.search_table import Letters

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=4000, hidden=512, layers=4, heads=8, kv_heads=4, head_dim=64, ffn=1024, context=512, qk_norm=True,
    init_std=0.05,
)  # fmt: skip

PROGRAMS = (Particle(), Priority(n=6), ParallelThoughts(thoughts=3))

SAMPLING = SamplingParams(temperature=0.9, max_tokens=40, seed=3)


def opened(**options: Any) -> Engine:
    model = Decoder(SHAPE).initialize(0).to("cuda", torch.bfloat16).eval()
    given = {"tokens": 256, "sequences": 64, "cache_tokens": 16384, "check": True} | options
    return build_engine(model, EngineConfig.model_validate(given))


def played(engine: Engine, places: list[int]) -> dict[int, Play]:
    """The plays of the programs at ``places``, all at once."""
    driver = Driver(engine, SAMPLING, {"": scored}, seconds=60)
    plays: dict[int, Play] = {}
    for place in places:
        search = Search(
            {},
            numbers(f"replayed {place}", 90),
            Letters(),
            seed=place,
            budget=Budget(amount=300),
            most=40,
            step="b",
            ends=frozenset(range(7, 4000, 60)),
            context=SHAPE.context,
            apart=engine.limits.apart,
            released=driver.released,
        )
        plays[place] = Play(search, PROGRAMS[place](search), Prices(SHAPE))
    ended = list(run(driver, iter(plays.values()), lambda: False))
    driver.abandon()
    assert len(ended) == len(places) and all(play.error is None for play in ended), [play.error for play in ended]
    return plays


def tree(play: Play) -> list[Any]:
    """All that is in it, to the last bit."""
    return [[each.tokens, each.logprobs, each.ended, each.score, each.fate] for each in play.search.branches]


def test_a_deterministic_engine_replays_a_search_to_the_same_tree_alone_and_beside_others() -> None:
    places = list(range(len(PROGRAMS)))
    together = played(opened(deterministic=True), places)
    assert any(len(play.search.branches) > 6 for play in together.values())
    other = opened(deterministic=True, tokens=96, sequences=24, cache_tokens=2400)
    for place in places:
        assert tree(played(other, [place])[place]) == tree(together[place])
    for number in range(12):  # and beside what no search has asked for
        sampling = SamplingParams(seed=number, max_tokens=40, ignore_eos=True)
        other.add(Request(f"guest {number}", numbers(f"guest {number}", 50), sampling))
    for place, play in played(other, places).items():
        assert tree(play) == tree(together[place])


def test_a_summary_computes_nothing_of_its_thoughts_again_but_their_last_tokens() -> None:
    engine = opened(kv_reuse={"name": "ape"}, loop="plain")
    positions: list[int] = []
    launch = engine.executor.launch
    engine.executor.launch = lambda batch: (positions.append(batch.tokens), launch(batch))[1]  # type: ignore[method-assign]
    (play,) = played(engine, [2]).values()
    assert play.answer is not None and len(play.answer.beside) == 3 and play.answer.generated
    ledger = play.search.ledger
    assert sum(positions) == ledger.computed == ledger.tokens + ledger.discarded
