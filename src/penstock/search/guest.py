"""Search behind a server: errands in the process of its engine, each a program at work on one request."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from penstock.core.config import Config, build
from penstock.models import hub
from penstock.search.driver import Driver, TokenizedTexts
from penstock.search.ledger import Budget
from penstock.search.llm import Plan, SearchResult, begun, checking, program_of, ready, scoring_of
from penstock.search.play import Play
from penstock.search.prices import Prices, Unit
from penstock.search.search import Voice
from penstock.serve.engine.engine import Engine
from penstock.serve.link.wire import Done
from penstock.serve.messages import Delta, Request

#: Seconds that scorers are waited for where the engine has nothing else to do: messages wait as long.
MOMENT = 0.01

#: Branches that a search may have open at once: they are made on the engine's thread, while all others wait.
WIDTH = 1024


class Work(Config):
    """What is asked for beside a request; see ``penstock.serve.http.searches``.

    Attributes:
        program: its name and options.
        scorer: its name, if there is one.
        budget, unit: what may be spent.
        step: what ends a step of a text.
        problem: what scorers know of it.
        seconds: for each text, after which its scoring has failed.
    """

    program: dict[str, Any]
    scorer: str | None = None
    budget: float = Field(gt=0)
    unit: Unit = "generated"
    step: str = "\n\n"
    problem: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 60.0


@dataclasses.dataclass
class _Errand:
    """A search under way, and when it has to end."""

    driver: Driver
    play: Play
    deadline: float


class Searches:
    """Does searches over ``engine``. See :class:`~penstock.serve.link.host.Guest`.

    Args:
        engine: computes.
        model: that it has loaded, whose tokenizer reads texts.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._texts = TokenizedTexts(hub.load_tokenizer(hub.resolve(model)))
        self._prices = Prices(engine.limits.model, selection=engine.limits.selection)
        self._errands: dict[str, _Errand] = {}

    @property
    def busy(self) -> bool:
        return bool(self._errands)

    def begin(self, request: Request, work: str) -> None:
        wanted, engine = build(Work, json.loads(work), "the search"), self._engine
        scorers = {} if wanted.scorer is None else {"": scoring_of(wanted.scorer)}
        budget = Budget(amount=wanted.budget, unit=wanted.unit)
        plan = Plan(program_of(wanted.program), scorers, request.sampling, budget, wanted.step, width=WIDTH)
        ready(plan, ())
        checking(plan.program)(wanted.problem)
        driver = Driver(engine, plan.sampling, plan.scorers, wanted.seconds, like=request)
        limits = engine.limits
        voice = Voice(self._texts, tuple(request.prompt), engine.ends, limits.context, limits.apart)
        play = begun(plan, wanted.problem, {"": voice}, plan.sampling.seed, {"": self._prices}, driver)
        deadline = time.monotonic() + (float("inf") if request.deadline is None else request.deadline)
        self._errands[request.id] = _Errand(driver, play, deadline)
        driver.add(play)

    def end(self, id: str) -> None:
        if id in self._errands:
            self._errands[id].deadline = 0.0

    def take(self, deltas: Sequence[Delta]) -> tuple[list[Delta], list[Done]]:
        done, mine = [], set[str]()
        patience = 0.0 if self._engine.busy else MOMENT / max(1, len(self._errands))
        for id, errand in list(self._errands.items()):
            own = [delta for delta in deltas if delta.id.startswith(f"{id}/search/")]
            mine |= {delta.id for delta in own}
            errand.driver.take(own)
            if not errand.driver.ended(patience) and time.monotonic() > errand.deadline:
                errand.driver.drop(errand.play)
            if errand.play.done:
                del self._errands[id]
                record = SearchResult.of(id, errand.play).record()
                done.append(Done(id, json.dumps({name: each for name, each in record.items() if name != "tree"})))
        return [delta for delta in deltas if delta.id not in mine and "/search/" not in delta.id], done


def guest(engine: Engine, model: str) -> Searches:
    """Who does errands of this module in the process of an engine."""
    return Searches(engine, model)
