"""Search in this process: problems in, answers out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from penstock.core.config import build
from penstock.core.errors import UsageError
from penstock.core.progress import Reporter, show
from penstock.core.randomness import derive
from penstock.core.signals import StopRequest
from penstock.plan.hardware import named
from penstock.policy import create
from penstock.search.answers import last_line, matching
from penstock.search.contract import Program
from penstock.search.driver import Driver, TokenizedTexts, run
from penstock.search.ledger import Budget, Ledger
from penstock.search.play import Play
from penstock.search.prices import Prices
from penstock.search.problems import check_prompt
from penstock.search.scorers.contract import Problem, Scorer, Scoring, Single
from penstock.search.search import Search, Voice, unknown_model
from penstock.serve.chat import chat_tokens
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.engine import Engine
from penstock.serve.offline import llm

#: No budget: programs end on their own.
UNLIMITED = Budget()

#: A program: a policy, its name, a table with name and options, or a function such as :meth:`Program.run`.
ProgramLike = Program | str | Mapping[str, Any] | Callable[[Search], Any]

#: A scorer: a policy, its name, a table with name and options, or a function of the problem and a text.
ScorerLike = Scorer | str | Mapping[str, Any] | Callable[[Problem, str], float]


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What came of a problem.

    Attributes:
        id: of the problem.
        text, tokens, answer, score, finished: of the branch that was chosen; empty where there was none.
        ledger: what was spent.
        exhausted: whether the budget ended it.
        notes: what the program noted.
        error: why the program failed; None where it did not.
        tree: a record of each branch, in the order in which they were made.
    """

    id: str
    text: str
    tokens: list[int]
    answer: str
    score: float | None
    finished: bool
    ledger: Ledger
    exhausted: bool
    notes: dict[str, Any]
    error: str | None
    tree: list[dict[str, Any]]

    @classmethod
    def of(cls, id: str, play: Play) -> SearchResult:
        """What ``play`` has come to."""
        search, answer = play.search, play.answer
        error = None if play.error is None else f"{type(play.error).__name__}: {play.error}"
        return cls(
            id,
            "" if answer is None else answer.text,
            [] if answer is None else answer.generated,
            "" if answer is None else answer.answer,
            None if answer is None else answer.score,
            answer is not None and answer.finished,
            search.ledger,
            search.exhausted,
            search.notes,
            error,
            [branch.record() for branch in search.branches],
        )

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {**dataclasses.asdict(self), "ledger": self.ledger.record()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How problems are searched.

    Attributes:
        program: spends the budget.
        scorers: by name; the one without a name is the program's own.
        sampling: how tokens are chosen; its seed is that of the whole search.
        budget: for each problem.
        step: what ends a step of a text.
        answer: reads the answer off a text.
        device: whose operations per byte eFLOPs are counted by.
        seconds: for each text, after which its scoring has failed.
        models: further ones, by name, for programs that ask them.
        width: the most branches of a problem that may be open at once; no limit by default.
    """

    program: Callable[[Search], Any]
    scorers: Mapping[str, Scoring]
    sampling: SamplingParams
    budget: Budget = UNLIMITED
    step: str = "\n\n"
    answer: Callable[[str], str] = last_line
    device: str = "h100"
    seconds: float = 60.0
    models: Mapping[str, llm.LLM] = dataclasses.field(default_factory=dict)
    width: int | None = None


class LLM(llm.LLM):
    """:class:`penstock.serve.offline.llm.LLM`, which also searches::

    llm = LLM("python-6m")
    for result in llm.search(problems, "best_of_n", scorer="unit_tests", budget=2000):
        print(result.answer, result.ledger.generated)
    """

    def search(
        self,
        problems: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        program: ProgramLike = "best_of_n",
        *,
        scorer: ScorerLike | None = None,
        scorers: Mapping[str, ScorerLike] | None = None,
        models: Mapping[str, llm.LLM] | None = None,
        budget: float | None = None,
        unit: str = "generated",
        sampling_params: SamplingParams | None = None,
        step: str = "\n\n",
        answer: str | Callable[[str], str] = last_line,
        progress: Reporter = show,
    ) -> list[SearchResult]:
        """Runs ``program`` on each of the ``problems``, all in one continuous batch; the results come in their order.

        Args:
            problems: texts to continue, or tables with a ``prompt``, ``prompt_token_ids`` or ``messages``, and whatever
                the scorer needs besides, such as ``tests`` or ``answer``.
            program: a name, a table with ``name`` and options, a policy, or an async function of a
                :class:`~penstock.search.search.Search`.
            scorer: the program's scorer, likewise, or a function ``score(problem, text)``, which runs in this process.
            scorers: further ones by name, for programs that ask for them.
            models: further ones by name, such as the strong one of a cascade, for programs that ask them.
            budget: what may be spent on each problem, in ``unit``: ``generated`` tokens, ``tokens`` computed,
                ``flops`` or ``eflops``; no limit by default.
            sampling_params: how tokens are chosen; ``max_tokens`` is the longest text, and its ``seed`` that of all.
            step: what ends a step of a text.
            answer: reads the answer off a text; a regular expression, or a function. By default what is in the last
                ``\\boxed{}``, or the last line.
            progress: how to report; ``core.progress.silent`` is quiet.

        Raises:
            UsageError: a problem has no prompt, or the program or scorer is unknown.
            KeyboardInterrupt: after Ctrl-C; the engine is free for the next call.
        """
        several = [problems] if isinstance(problems, str | Mapping) else list(problems)
        tables = [{"prompt": each} if isinstance(each, str) else each for each in several]
        plan = Plan(
            program_of(program),
            {name: scoring_of(each) for name, each in {"": scorer, **(scorers or {})}.items() if each is not None},
            sampling_params or SamplingParams(),
            build(Budget, {"amount": budget, "unit": unit}, "the budget"),
            step,
            matching(answer) if isinstance(answer, str) else answer,
            models=dict(models or {}),
        )
        results: dict[int, SearchResult] = {}
        with progress("searching", len(tables), "problem") as bar:
            for place, result in self.searched(plan, list(enumerate(tables))):
                results[place] = result
                bar.advance()
        return [results[place] for place in range(len(tables))]

    def searched(
        self, plan: Plan, problems: Sequence[tuple[int, Mapping[str, Any]]], stop: StopRequest | None = None
    ) -> Iterator[tuple[int, SearchResult]]:
        """The results of ``problems``, each with its place, as they come. The seed of a problem depends on its place
        alone. Where ``stop`` is wanted, no more come.

        Raises:
            PenstockError: a problem cannot be read, or a model is not there that the program or a scorer asks; nothing
                was searched then.
            KeyboardInterrupt: after Ctrl-C, where no ``stop`` was given.
        """
        ready(plan, plan.models)
        check = checking(plan.program)
        for _, table in problems:
            check_prompt(table)
            check(table)
        voices = [
            {name: _voice(model, table, plan) for name, model in {"": self, **plan.models}.items()}
            for _, table in problems
        ]
        engines = {name: model.engine for name, model in plan.models.items()}
        driver = Driver(self.engine, plan.sampling, plan.scorers, plan.seconds, engines)
        prices = _prices(self.engine, plan.device)
        others = {name: _prices(engine, plan.device) for name, engine in engines.items()}
        places: dict[Play, int] = {}

        def plays() -> Iterator[Play]:
            for (place, table), voiced in zip(problems, voices, strict=True):
                # The first is drawn as the engine draws a request with this seed.
                seed = derive(plan.sampling.seed, "search", place) >> 1 if place else plan.sampling.seed
                play = begun(plan, table, voiced, seed, {"": prices, **others}, driver)
                places[play] = place
                yield play

        with contextlib.ExitStack() as stack:
            asked = stop or stack.enter_context(StopRequest())
            stack.callback(driver.abandon)
            for play in run(driver, plays(), lambda: asked.wanted):
                place = places.pop(play)
                yield place, SearchResult.of(str(play.search.problem.get("id", place)), play)
            if asked.wanted and stop is None:
                raise KeyboardInterrupt


def _prices(engine: Engine, device: str) -> Prices:
    """What tokens of ``engine`` cost, with what they read of its cache."""
    return Prices(engine.limits.model, named(device), selection=engine.limits.selection)


def begun(
    plan: Plan,
    problem: Mapping[str, Any],
    voices: Mapping[str, Voice],
    seed: int,
    prices: Mapping[str, Prices],
    driver: Driver,
) -> Play:
    """The program at work on a problem, for the ``driver`` to run. ``voices`` and ``prices`` are the models' by name;
    the search's own is without a name."""
    own = voices[""]
    search = Search(
        problem,
        own.prompt,
        own.texts,
        seed=seed,
        budget=plan.budget,
        most=plan.sampling.max_tokens,
        step=plan.step,
        stop=plan.sampling.stop,
        answer=plan.answer,
        ends=own.ends | frozenset(plan.sampling.stop_tokens),
        context=own.context,
        apart=own.apart,
        others={name: voice for name, voice in voices.items() if name},
        released=driver.released,
        width=plan.width,
        scorers=plan.scorers,
    )
    return Play(search, plan.program(search), prices[""], {name: each for name, each in prices.items() if name})


def _voice(model: llm.LLM, problem: Mapping[str, Any], plan: Plan) -> Voice:
    """``model``, with the problem's prompt in its tokens.

    Raises:
        UsageError: there is none, or it fills the model's context.
    """
    if "messages" in problem:
        tokens = chat_tokens(model.tokenizer, problem["messages"])
    else:
        tokens = model.tokens(problem)
    context = model.engine.limits.context
    if not 0 < len(tokens) < context:
        raise UsageError(
            f"the prompt of {problem.get('id', 'a problem')} has {len(tokens)} tokens, and 1 to {context - 1} fit"
        )
    apart = model.engine.limits.apart
    return Voice(TokenizedTexts(model.tokenizer), tuple(tokens), model.engine.ends, context, apart)


def ready(plan: Plan, models: Iterable[str]) -> None:
    """Makes sure, before anything is spent, that the program has the ``models`` that it may ask, by name, and that
    the scorers can judge.

    Raises:
        PenstockError: they do not, or cannot.
    """
    for name in plan.program.asks() if isinstance(plan.program, Program) else ():
        if name not in models:
            raise unknown_model(name, models)
    for scoring in plan.scorers.values():
        if isinstance(scoring, Scorer):
            scoring.open()


def checking(program: Callable[[Search], Any]) -> Callable[[Mapping[str, Any]], None]:
    """What refuses problems that the ``program`` cannot read."""
    return program.check if isinstance(program, Program) else lambda problem: None


def program_of(given: ProgramLike) -> Callable[[Search], Any]:
    """What runs a program.

    Raises:
        UsageError: there is none of that name; the message lists the nearest.
    """
    made = _created("search.program", given)
    if not callable(made):
        raise UsageError(f"{made!r} is no program", hint="Give a name, or an async function of a Search.")
    return cast(Callable[[Search], Any], made)


def scoring_of(given: ScorerLike) -> Scoring:
    """What scores.

    Raises:
        UsageError: there is none of that name; the message lists the nearest.
    """
    made = _created("search.scorer", given)
    if isinstance(made, Scorer):
        return made
    if not callable(made):
        raise UsageError(f"{made!r} is no scorer", hint="Give a name, or a function of the problem and a text.")
    return Single(made)


def _created(contract: str, given: Any) -> Any:
    if isinstance(given, str):
        return create(contract, given)
    if isinstance(given, Mapping):
        options = dict(given)
        return create(contract, str(options.pop("name", "")), **options)
    return given
