"""The law of ``search.program``, played on a small engine with random weights, whose texts are letters.

What each clause is there to catch:

- :func:`check_budget`: a unit that is counted late, or for one branch only; tokens that are granted twice; a budget
  that is left over although the program would go on;
- :func:`check_recount`: tokens, cache hits or computed positions that the ledger misses or counts twice; a branch that
  computes what its parent did; blocks that stay in the cache; a count of open branches, which is limited, that is off;
- :func:`check_limit`: draws that depend on how a text was cut into steps, or on the branch's place in the tree; texts
  that are changed on the way;
- :func:`check_alone`: what depends on the order in which things happen to be done, or on memory being short;
- :func:`check_failures`: a scorer whose failure is taken for a score, lost, or ends the program; one that is taken for
  a good score where others are negative.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from penstock.search.contract import Program
from penstock.search.driver import Driver, run
from penstock.search.ledger import Budget, Ledger, total
from penstock.search.play import Play
from penstock.search.prices import Prices
from penstock.search.scorers.contract import Candidate, Problem, Scoring, Verdict
from penstock.search.search import Search, Voice
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.testing.engine.requests import numbers
from penstock.testing.search_table import Letters
from penstock.testing.serve_model import SHAPE, small_model

#: Tokens that end a text; and the letter that ends a step, which stands for several tokens.
ENDS, STEP = frozenset({7, 8, 9, 10}), "b"

#: The longest text.
MOST = 12

#: Figures of a ledger that may depend on what else the engine does.
BESIDE = ("discarded", "cached", "computed", "blocks")

#: Amounts of a budget, by unit: of generated tokens, or what so many are worth.
AMOUNTS = {"generated": (0, 1, 33), "tokens": (20,), "flops": (1,), "eflops": (25,)}

SAMPLING = SamplingParams(max_tokens=MOST, seed=3)

PRICES = Prices(SHAPE)


def check(program: Program) -> None:
    """Asserts the law."""
    check_limit(program)
    check_budget(program)
    check_recount(program)
    check_alone(program)
    check_failures(program)


def check_limit(program: Program) -> None:
    """Asserts that in the case of one sample it is plain sampling with the same seed."""
    seeds = range(5)
    searches = [_search(numbers(f"limit {seed}", 9), seed) for seed in seeds]
    for seed, plain, play in zip(
        seeds, _plain(), _played(small_engine(), searches, type(program).limit()), strict=True
    ):
        assert play.answer is not None, "one sample gives no answer"
        found = play.answer.generated
        assert found == plain, f"one sample is {found}, and plain sampling {plain}, with seed {seed}"


@functools.cache
def _plain() -> list[list[int]]:
    """What plain sampling gives with each seed; the same for all programs."""
    engine, found = small_engine(), []
    for seed in range(5):
        engine.add(Request("plain", numbers(f"limit {seed}", 9), SAMPLING.model_copy(update={"seed": seed})))
        found.append([token for delta in _drained(engine) for token in delta.tokens])
    return found


def check_budget(program: Program) -> None:
    """Asserts that no budget is exceeded, and none left that the program would have used: as it does without one."""
    prices = PRICES
    prompt = numbers("budget", 9)
    (free,) = _played(small_engine(), [_search(prompt, 0)], program)
    # With a little less than it wants, what texts leave that end early has to go to the others.
    nearly = {"generated": (*AMOUNTS["generated"], max(1, free.search.ledger.generated - 2))}
    budgets = [
        Budget.model_validate({"amount": _worth(prices, unit, amount), "unit": unit})
        for unit, amounts in (AMOUNTS | nearly).items()
        for amount in amounts
    ]
    for play in _played(small_engine(), [_search(prompt, 0, budget) for budget in budgets], program):
        unit, most = play.search.budget.unit, play.search.budget.amount or 0.0
        assert play.error is None, f"a budget of {most} {unit} makes it fail: {play.error}"
        spent = float(getattr(play.search.ledger, unit))
        assert spent <= most * (1 + 1e-12), f"{spent} {unit} are spent of {most}"
        if float(getattr(free.search.ledger, unit)) > most:
            # The next token may stand behind a question.
            asked = max(branch.appended for branch in free.search.branches)
            last = max(len(branch.tokens) for branch in free.search.branches)
            dearest = _worth(prices, unit, last) - _worth(
                prices, unit, last - 1 - (0 if unit == "generated" else asked)
            )
            assert spent > most - dearest - (_worth(prices, unit, 9) if not spent else 0), (
                f"{most - spent} {unit} are left of {most}, enough for a token"
            )


def check_recount(program: Program) -> None:
    """Asserts that ledgers add up to what the engine did, and that it computed nothing twice and keeps nothing."""
    engine = small_engine.__wrapped__(cache_tokens=2400)
    searches = [_search(numbers(f"recount {seed}", 8 + seed), seed, Budget(amount=70)) for seed in range(3)]
    positions: list[int] = []
    plays = _played(engine, searches, program, positions)
    found, now = total([play.search.ledger for play in plays]), engine.snapshot()
    came = found.generated + found.discarded
    assert came == now.output_tokens, f"{came} tokens came out, and the engine gave {now.output_tokens}"
    assert found.cached == now.cached_tokens, f"{found.cached} found, and the engine says {now.cached_tokens}"
    assert found.computed == sum(positions), f"{found.computed} computed, and the engine's steps have {sum(positions)}"
    needed = found.tokens + found.discarded
    assert found.computed == needed, f"{found.computed} positions are computed, and {needed} need to be"
    grown = sum(branch.record()["tokens"] for play in plays for branch in play.search.branches)
    given = sum(branch.start for each in searches for branch in each.branches if branch.parent is None)
    assert grown == found.generated + found.prompt - given, "the ledger's tokens are not those of the tree"
    assert now.held == 0, f"{now.held} blocks stay in the cache"
    for each in searches:
        leaves = sum(not branch.dropped and not branch.children for branch in each.branches)
        assert each.open == leaves, f"{each.open} branches are said to be open, and {leaves} are"


def check_alone(program: Program) -> None:
    """Asserts that a problem's tree is the same beside others, overlapped, and where memory is short."""
    seeds = range(2)
    alone = [_played(small_engine(), [_named(seed)], program)[0] for seed in seeds]
    engine = small_engine(loop="overlapped", sequences=5, cache_tokens=100)
    beside = _played(engine, [_named(seed) for seed in seeds], program)
    for seed, one, other in zip(seeds, alone, beside, strict=True):
        assert _tree(one) == _tree(other), f"the tree of problem {seed} is another beside others"
        assert _spent(one.search.ledger) == _spent(other.search.ledger)
    assert engine.snapshot().held == 0


def check_failures(program: Program) -> None:
    """Asserts that a scorer may fail, each time in another way."""
    ways = itertools.cycle((_raising, _no_number, _too_few))

    def failing(problem: Problem, candidates: Sequence[Candidate]) -> list[float]:
        return next(ways)(problem, candidates)

    (play,) = _played(small_engine(), [_named(0)], program, scoring=failing)
    ledger = play.search.ledger
    assert play.error is None, f"a scorer that fails ends the program: {play.error}"
    assert play.answer is not None, "a scorer that fails leaves no answer"
    assert ledger.failures == ledger.scorings, f"{ledger.failures} failures of {ledger.scorings} scorings"
    for play in _played(small_engine(), [_named(seed) for seed in range(8)], program, scoring=_partly):
        assert play.error is None and play.answer is not None
        judged = [each for each in play.search.leaves if each.finished and not each.dropped and each.score is not None]
        if any(each.error is None for each in judged):
            assert play.answer.error is None, "a text that could not be scored is chosen, and another was there"


@functools.cache
def small_engine(**options: Any) -> Engine:
    """An engine that is checked after every step; the same for the same options, with what it did before."""
    given = {"loop": "plain", "attention": "reference", "tokens": 96, "sequences": 48, "block_size": 4}
    given |= {"cache_tokens": 800, "check": True} | options
    return build_engine(small_model(), EngineConfig.model_validate(given), ENDS)


def scored(problem: Problem, candidates: Sequence[Candidate]) -> list[float]:
    """The scorer: how often letters of two kinds follow each other, and less for parts."""
    return [_worth_of(each.text) * (1.0 if each.finished else 0.5) for each in candidates]


@functools.cache
def _worth_of(text: str) -> float:
    pairs = sum((ord(one) + 3 * ord(other)) % 5 == 0 for one, other in itertools.pairwise(text))
    return pairs / max(1, len(text))


def _search(prompt: list[int], seed: int, budget: Budget | None = None) -> Search:
    return Search(
        {"answer": "ab"},
        prompt,
        Letters(),
        seed=seed,
        budget=budget,
        most=MOST,
        step=STEP,
        ends=ENDS,
        context=SHAPE.context,
        # The same model, under another prompt: what is counted for both is one engine's.
        others={"strong": Voice(Letters(), tuple(numbers(f"strong {len(prompt)}", 7)), ENDS, SHAPE.context)},
        answer=lambda text: text[-2:],
    )


def _named(seed: int) -> Search:
    return _search(numbers(f"alone {seed}", 6 + 3 * seed), seed, Budget(amount=40))


def _played(
    engine: Engine,
    searches: Sequence[Search],
    program: Program,
    positions: list[int] | None = None,
    scoring: Scoring = scored,
) -> list[Play]:
    """Plays ``program`` on all ``searches`` at once; ``positions`` is told what each step of the engine computed."""
    engine.memory.pool.forget()
    driver = Driver(engine, SAMPLING, {"": scoring}, seconds=30, others={"strong": engine})
    plays = []
    for search in searches:
        search._released = driver.released
        plays.append(Play(search, program.run(search), PRICES, {"strong": PRICES}))
    if positions is not None:
        launch = engine.executor.launch

        def counted(batch: Any) -> Any:
            positions.append(batch.tokens)
            return launch(batch)

        engine.executor.launch = counted  # type: ignore[method-assign]
    ended = list(run(driver, iter(plays), lambda: False))
    driver.abandon()  # what the engine has not told yet is told to nobody
    assert len(ended) == len(plays), "a program does not end"
    return plays


def _drained(engine: Engine) -> list[Any]:
    deltas = []
    while engine.busy:
        deltas += engine.step()
    return deltas


def _worth(prices: Prices, unit: Any, tokens: int) -> float:
    return float(tokens) if unit == "generated" else prices.cost(unit, 0, tokens)


def _tree(play: Play) -> list[Any]:
    assert play.answer is not None
    return [play.answer.number, *([each.tokens, each.ended, each.score, each.fate] for each in play.search.branches)]


def _spent(ledger: Ledger) -> dict[str, Any]:
    record = ledger.record()
    return {name: value for name, value in record.items() if name not in BESIDE}


def _partly(problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
    """Fails on half of the texts; the others are worth something negative."""
    return [
        Verdict.failure("it cannot be scored") if sum(map(ord, each.text)) % 2 else _worth_of(each.text) - 9
        for each in candidates
    ]


def _raising(problem: Problem, candidates: Sequence[Candidate]) -> list[float]:
    raise RuntimeError("the scorer is broken")


def _no_number(problem: Problem, candidates: Sequence[Candidate]) -> list[float]:
    return [math.nan for _ in candidates]


def _too_few(problem: Problem, candidates: Sequence[Candidate]) -> list[float]:
    return [1.0] * (len(candidates) + 1)
