"""What the driver counts while branches grow."""

from __future__ import annotations

import pytest

from penstock.search import driver as drivers
from penstock.search.branch import Branch
from penstock.search.driver import Driver, run
from penstock.search.play import Play
from penstock.search.search import Search, Voice
from penstock.testing.search_program import PRICES, SAMPLING, small_engine
from penstock.testing.search_table import Letters


@pytest.mark.parametrize(("dropped", "blocks"), [(0, 2 + 5 * 3 + 1), (2, 2 + 3 * 3 + 2)])
def test_blocks_are_those_of_the_widest_round_each_counted_once(dropped, blocks):
    """Of a prompt of 9 tokens in blocks of 4, two blocks are full, which all branches share. With 6 tokens more, 14 are
    in the cache, for each branch in two blocks of its own; with another 4, 18 in three. What the first computed before
    is held by the root, too: where it goes on, all but the last block, which was not full, is its own as well."""

    async def program(search: Search) -> Branch | None:
        branches = await search.extend(search.root.fork(5), tokens=6)
        for branch in branches[:dropped]:
            branch.drop()
        return (await search.extend(branches[dropped:], tokens=4))[0]

    engine = small_engine()
    engine.memory.pool.forget()
    driver = Driver(engine, SAMPLING.model_copy(update={"ignore_eos": True}), {})
    search = Search({}, list(range(20, 29)), Letters(), most=12, released=driver.released)
    (play,) = run(driver, iter([Play(search, program(search), PRICES)]), lambda: False)
    assert play.error is None and play.search.ledger.generated == 5 * 6 + (5 - dropped) * 4
    assert play.search.ledger.blocks == blocks
    assert engine.snapshot().held == 0


def test_what_may_never_be_drawn_is_no_alternative():
    """The most probable of the others take its place; the search's own model under another name may not draw it
    either, and another model may."""

    async def program(search: Search) -> Branch | None:
        branches = [search.root.fork(1)[0], *(search.root_of(name).fork(1)[0] for name in ("same", "other"))]
        return (await search.extend(branches, tokens=3, top=4))[0]

    def played(barred: list[int]) -> list[Branch]:
        engine, another = small_engine(), small_engine(cache_tokens=400)
        sampling = SAMPLING.model_copy(update={"temperature": 0, "logit_bias": dict.fromkeys(barred, -100.0)})
        driver = Driver(engine, sampling, {}, others={"same": engine, "other": another})
        prompt = list(range(20, 29))
        others = {name: Voice(Letters(), tuple(prompt)) for name in ("same", "other")}
        search = Search({}, prompt, Letters(), most=12, released=driver.released, others=others)
        play = Play(search, program(search), PRICES, dict.fromkeys(others, PRICES))
        assert list(run(driver, iter([play]), lambda: False)) == [play] and play.error is None
        return [each for each in search.branches if each.parent is not None]

    free = played([])
    best = [token for token, _ in free[0].alternatives[9]]
    assert free[0].tokens[9] == best[0] and len(best) == 4
    own, same, other = played(best[:2])
    for each in (own, same):
        assert [token for token, _ in each.alternatives[9]][:2] == best[2:] and each.tokens[9] == best[2]
        assert len(each.alternatives[9]) == 4
    assert other.tokens == free[2].tokens and [token for token, _ in other.alternatives[9]] == best


async def pair(search: Search) -> Branch | None:
    return (await search.extend(search.root.fork(2)))[0]


def begun(driver: Driver) -> Play:
    search = Search({}, list(range(20, 29)), Letters(), most=12, released=driver.released)
    return Play(search, pair(search), PRICES)


def test_tokens_are_the_same_however_many_are_taken_in_together(monkeypatch):
    found = []
    for bundle in (1, 5, 32):
        monkeypatch.setattr(drivers, "BUNDLE", bundle)
        driver = Driver(small_engine(), SAMPLING.model_copy(update={"ignore_eos": True}), {})
        (play,) = run(driver, iter([begun(driver)]), lambda: False)
        assert play.search.ledger.generated == 2 * 12
        found.append([(each.tokens, each.logprobs, each.entropies, each.certainties) for each in play.search.branches])
    assert found[0] == found[1] == found[2] and all(0 < entropy < 9 for each in found[0] for entropy in each[2])


def test_a_search_that_is_dropped_has_all_tokens_that_came():
    """Those that were not taken in yet too: as many as the engine gave."""
    engine = small_engine()
    before = engine.snapshot().output_tokens
    driver = Driver(engine, SAMPLING.model_copy(update={"ignore_eos": True}), {})
    play = begun(driver)
    driver.add(play)
    for _ in range(5):
        assert not driver.step()
    driver.drop(play)
    came = engine.snapshot().output_tokens - before
    assert came > 5 and play.search.ledger.generated == came
    assert play.answer is not None and len(play.answer.generated) in (came // 2, came - came // 2)
    while engine.busy:
        engine.step()
    assert engine.snapshot().held == 0
