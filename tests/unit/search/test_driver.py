"""What the driver counts while branches grow."""

from __future__ import annotations

import pytest

from penstock.search.branch import Branch
from penstock.search.driver import Driver, run
from penstock.search.play import Play
from penstock.search.search import Search
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
