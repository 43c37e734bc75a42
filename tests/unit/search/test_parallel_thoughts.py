"""Parallel thoughts [343]: a summary that reads the thoughts where they are in the cache."""

from __future__ import annotations

import re

import pytest

from penstock.search.branch import Branch
from penstock.search.driver import Driver, run
from penstock.search.ledger import Budget
from penstock.search.play import Play
from penstock.search.prices import Prices
from penstock.search.programs.parallel_thoughts import ParallelThoughts
from penstock.search.search import Search
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.reuse.ape import AdaptiveParallelEncoding
from penstock.serve.kv.reuse.prefix import PrefixReuse
from penstock.testing.beside_scores import BesideScores
from penstock.testing.engine.requests import numbers
from penstock.testing.kv_reuse import exact_model, opened
from penstock.testing.reference import every_logits
from penstock.testing.search_table import Letters
from penstock.testing.serve_model import SHAPE

#: Letters without those that end a text, which a thought may be cut short of.
ENDS = frozenset({7, 8})

PROMPT = numbers("parallel", 10)


class Controls(Letters):
    """Letters and control tokens: ``<1>`` is one token, and three letters if it is cut."""

    def encode(self, text: str) -> list[int]:
        parts = re.split(r"<(\d)>", text)
        return [
            token for place, part in enumerate(parts) for token in ([20 + int(part)] if place % 2 else map(ord, part))
        ]


def played(
    engine: Engine, program, budget: Budget | None = None, texts: Letters | None = None
) -> tuple[Play, list[int]]:
    """The play of ``program``, and how many tokens each step of the engine computed."""
    positions: list[int] = []
    launch = engine.executor.launch
    engine.executor.launch = lambda batch: (positions.append(batch.tokens), launch(batch))[1]
    driver = Driver(engine, SamplingParams(max_tokens=9, seed=5), {})
    search = Search(
        {},
        PROMPT,
        texts or Letters(),
        seed=5,
        most=9,
        ends=ENDS,
        context=SHAPE.context,
        apart=engine.limits.apart,
        budget=budget,
    )
    search._released = driver.released
    play = Play(search, program(search), Prices(SHAPE))
    ended = list(run(driver, iter([play]), lambda: False))
    driver.abandon()
    engine.executor.launch = launch
    assert ended == [play] and play.error is None, play.error
    assert engine.snapshot().held == 0
    return play, positions


def contexts(play: Play, answer: Branch) -> list[list[int]]:
    return [answer.tokens[first:last] for _, first, last in answer.beside]


@pytest.mark.parametrize("weighing", [{}, {"temperature": 1.0, "scale": 1.0}], ids=["ape", "one softmax"])
def test_the_summary_is_that_of_a_dense_pass_over_all_thoughts(weighing):
    """Log-probabilities against an oracle that encodes each thought anew, and one float64 softmax over all of them."""
    policy = AdaptiveParallelEncoding(**weighing)
    play, _ = played(opened(policy), ParallelThoughts(thoughts=3, begin="{number}c", summarise="de").run)
    answer = play.answer
    assert answer is not None and len(answer.generated) > 1
    seen = contexts(play, answer)
    behind = answer.tokens[answer.beside[-1][2] : answer.prompt]
    assert len({tuple(each) for each in seen}) == 3
    scores = BesideScores(exact_model(), [*PROMPT, *behind, *answer.generated], seen, len(PROMPT), policy.weighing)
    for place, logprob in enumerate(answer.logprobs):
        text = [*PROMPT, *behind, *answer.generated[:place]]
        wanted = scores.after(text).log_softmax(-1)[answer.generated[place]]
        assert logprob == pytest.approx(float(wanted), abs=1e-5)


def test_nothing_of_the_thoughts_is_computed_again_but_their_last_tokens():
    """Against a count of what has to be computed: each step of the engine is counted."""
    play, positions = played(opened(AdaptiveParallelEncoding()), ParallelThoughts(thoughts=3, begin="{number}c").run)
    search, answer = play.search, play.answer
    assert answer is not None
    thoughts = [each for each, *_ in answer.beside]
    # The prompt once, and of each thought all but what it drew last; then that, the words behind them, and the summary.
    drawn = len(PROMPT) + sum(len(each.tokens) - len(PROMPT) - 1 for each in thoughts)
    wanted = drawn + len(thoughts) + len(answer.tokens) - answer.beside[-1][2] - 1
    assert search.ledger.computed == sum(positions)
    assert search.ledger.tokens + search.ledger.discarded == sum(positions) == wanted


def test_texts_in_a_row_are_computed_anew_and_say_the_same_words():
    play, positions = played(opened(PrefixReuse()), ParallelThoughts(thoughts=2, begin="{number}c", summarise="de").run)
    answer = play.answer
    assert answer is not None and not answer.beside
    assert play.search.ledger.computed == sum(positions)
    rows = every_logits(exact_model(), answer.tokens).log_softmax(-1)
    for place, logprob in enumerate(answer.logprobs, answer.prompt):
        assert logprob == pytest.approx(float(rows[place - 1, answer.tokens[place]]), abs=1e-5)


def test_control_tokens_begin_thoughts_whole_behind_what_is_alike():
    program = ParallelThoughts(thoughts=3, begin="\x05\x06<{number}>\x05", summarise="<9>")
    play, _ = played(opened(AdaptiveParallelEncoding()), program.run, texts=Controls())
    answer, behind = play.answer, len(PROMPT)
    assert answer is not None and answer.tokens[answer.prompt - 1] == 29
    assert [each[:4] for each in contexts(play, answer)] == [[5, 6, 20 + number, 5] for number in (1, 2, 3)]
    trunk = answer.beside[0][0].parent
    assert trunk is not None and trunk.tokens[behind:] == [5, 6]


def test_a_thought_knows_nothing_of_the_others():
    """Another beginning of one changes what it says, and no log-probability of the others."""

    def program(word: str):
        async def run(search: Search) -> Branch:
            thoughts = search.root.fork(2)
            for each, begin in zip(thoughts, ("a", word), strict=True):
                each.ask(begin)
            await search.extend(thoughts, tokens=4)
            return await search.beside(thoughts, "d").extend()

        return run

    one, other = (played(opened(AdaptiveParallelEncoding()), program(word))[0] for word in ("b", "c"))
    assert one.answer is not None and other.answer is not None
    kept, changed = ([play.answer.beside[place][0] for play in (one, other)] for place in (0, 1))
    assert kept[0].tokens == kept[1].tokens and kept[0].logprobs == pytest.approx(kept[1].logprobs, abs=1e-9)
    assert changed[0].logprobs != changed[1].logprobs
    assert one.answer.logprobs != other.answer.logprobs
