"""The engine's memory where it is hard to see from outside: forks, deadlines, ends, and the pool's own books."""

from __future__ import annotations

import pytest

from penstock.core.errors import UsageError
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.memory.memory import Memory
from penstock.serve.engine.sequence import Sequence
from penstock.serve.kv.pool import ROOT, BlockPool, InvariantError
from penstock.serve.messages import Finish, Request
from penstock.testing.engine.requests import numbers
from penstock.testing.reference import greedy
from penstock.testing.serve_model import small_model

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture
def engine():
    config = EngineConfig(
        loop="plain",
        attention="reference",
        batching=Sarathi(),
        tokens=32,
        sequences=6,
        block_size=4,
        cache_tokens=160,
        check=True,
    )
    return build_engine(small_model(), config)


def drain(engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.busy:
        for delta in engine.step():
            tokens.setdefault(delta.id, []).extend(delta.tokens)
    return tokens


def finish(engine) -> dict[str, list[int]]:
    tokens = drain(engine)
    assert engine.memory.pool.held == 0
    return tokens


def test_a_sequence_whose_block_has_a_twin_can_be_forked(engine):
    """Two equal prompts that end with a block: the second computes its last block itself, which the tree knows."""
    prompt = numbers("twin", 8)
    for id in "ab":
        engine.add(Request(id, prompt, SamplingParams(temperature=0, max_tokens=3)))
    (first, *_), (second, *_) = engine.step(), engine.step()
    said = [delta.tokens[0] for delta in (first, second)]
    engine.fork("b", Request("c", prompt + said[:1], GREEDY))
    engine.fork("b", Request("d", prompt, GREEDY))
    assert len(engine.memory.running) == 4
    tokens = finish(engine)
    assert tokens["c"] == greedy(small_model(), prompt + said[:1], 6)
    assert tokens["d"] == greedy(small_model(), prompt, 6)


def test_a_fork_computes_one_token_and_copies_one_block(engine):
    prompt = numbers("fork", 10)
    engine.add(Request("a", prompt, SamplingParams(temperature=0, max_tokens=20)))
    engine.step()
    before = engine.memory.pool.held
    engine.fork("a", Request("b", prompt, GREEDY))
    assert engine.memory.pool.held == before, "nothing is copied until one of them writes"
    engine.step()
    assert engine.steps.last.tokens == 2
    assert engine.memory.pool.held == before + 1
    finish(engine)


def test_a_fork_of_something_else_is_refused(engine):
    engine.add(Request("a", [1, 2, 3], GREEDY))
    for parent, prompt, index in (("none", [1, 2], 0), ("a", [1, 2, 3], 1)):
        with pytest.raises(UsageError, match="no continuation"):
            engine.fork(parent, Request("b", prompt, GREEDY), index)
    for prompt in ([1, 3, 3], [1, 2]):
        with pytest.raises(UsageError, match="does not begin with that of 'a'"):
            engine.fork("a", Request("b", prompt, GREEDY))
    finish(engine)


@pytest.mark.parametrize("loop", ["plain", "overlapped"])
def test_what_was_kept_is_gone_on_from_and_computed_once(loop):
    """Kept after 5 of 20 tokens, in the midst of a block; three go on, one of them with other tokens before."""
    config = EngineConfig(
        loop=loop, attention="reference", tokens=32, sequences=6, block_size=4, cache_tokens=160, check=True
    )
    engine = build_engine(small_model(), config)
    prompt = numbers("kept", 10)
    drawn = SamplingParams(seed=3, max_tokens=20)
    engine.add(Request("whole", prompt, drawn))
    whole = drain(engine)["whole"]
    engine.add(Request("a", prompt, drawn.model_copy(update={"max_tokens": 5}), keep=True))
    said = drain(engine)["a"]
    assert said == whole[:5]
    before = engine.snapshot()
    rest = drawn.model_copy(update={"max_tokens": 15})
    for id, more in (("same", []), ("other", []), ("fed", [1, 2, 3])):
        engine.fork("a", Request(id, prompt + said + more, rest.model_copy(update={"seed": 3 + (id == "other")})))
    told = drain(engine)
    assert told["same"] == whole[5:], "the draws go on where they were"
    assert told["other"] != told["same"]
    now = engine.snapshot()
    assert now.cached_tokens - before.cached_tokens == 3 * 14, "all but the last token"
    assert now.prompt_tokens - before.prompt_tokens == 3 * 15 + 3
    assert now.held == 4, "what is kept stays"
    engine.forget("a")
    engine.forget("unknown")
    assert engine.snapshot().held == 0


def test_what_is_kept_gives_way(engine):
    """Forty blocks; seven kept sequences of five blocks each leave too few for one of twelve."""
    for index in range(7):
        engine.add(Request(f"kept {index}", numbers(f"way {index}", 16), GREEDY, keep=True))
    drain(engine)
    assert engine.memory.pool.held >= 30
    prompt = numbers("newcomer", 44)
    engine.add(Request("newcomer", prompt, GREEDY))
    assert drain(engine)["newcomer"] == greedy(small_model(), prompt, 6)
    assert len(engine.memory.kept) < 7
    for index in range(7):
        text = numbers(f"way {index}", 16)
        engine.fork(f"kept {index}", Request(f"again {index}", text, GREEDY))
    tokens = drain(engine)
    assert all(tokens[f"again {index}"] == greedy(small_model(), numbers(f"way {index}", 16), 6) for index in range(7))
    for index in range(7):
        engine.forget(f"kept {index}")
    assert engine.memory.pool.held == 0


def test_only_one_continuation_is_kept(engine):
    with pytest.raises(UsageError, match="can be kept"):
        engine.add(Request("a", [1, 2, 3], GREEDY.model_copy(update={"n": 2}), keep=True))


def test_a_deadline_ends_a_request_wherever_it_is(engine, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("penstock.serve.engine.engine.time.monotonic", lambda: now[0])
    engine.add(Request("runs", [1, 2, 3], SamplingParams(temperature=0, max_tokens=50), deadline=5.0))
    engine.add(Request("short", [1, 2, 4], SamplingParams(temperature=0, max_tokens=3), deadline=5.0))
    engine.add(Request("free", [1, 2, 5], SamplingParams(temperature=0, max_tokens=12)))
    ends = {}
    for second in range(20):
        now[0] = 100.0 + second
        if second == 3:
            engine.add(Request("never", [4] * 90, GREEDY, deadline=0.0))
        for delta in engine.step():
            if delta.finish is not None:
                ends[delta.id] = (second, delta.finish)
    assert ends["runs"] == (5, Finish.DEADLINE)
    assert ends["short"] == (2, Finish.LENGTH)
    assert ends["never"] == (3, Finish.DEADLINE)
    assert ends["free"] == (11, Finish.LENGTH)
    assert engine.memory.pool.held == 0


def test_one_continuation_is_aborted_and_the_others_go_on(engine):
    engine.add(Request("a", [1, 2, 3], SamplingParams(n=3, max_tokens=8)))
    engine.step()
    engine.abort("a", 1)
    engine.abort("a", 9)
    ends: dict[int, Finish] = {}
    while engine.busy:
        ends |= {delta.index: delta.finish for delta in engine.step() if delta.finish}
    assert ends == {0: Finish.LENGTH, 1: Finish.ABORT, 2: Finish.LENGTH}


def test_a_prefix_is_taken_from_the_cache_and_the_oldest_is_evicted_first():
    pool = BlockPool(4, 2)
    blocks = pool.take(3)
    node = ROOT
    for tokens, block in zip([(1, 2), (3, 4), (5, 6)], blocks, strict=True):
        node = pool.commit(node, tokens, block)
    pool.release(blocks)
    assert pool.held == 0
    assert pool.match([1, 2, 3, 4, 9, 9], 6) == blocks[:2]
    assert pool.match([1, 2, 3, 4], 3) == blocks[:1]
    pool.take(2)
    assert pool.match([1, 2, 3, 4, 5, 6], 6) == blocks[:2], "the leaf went first"
    pool.check([[block] for block in range(4) if block not in blocks[:2]])


def test_what_hung_under_an_evicted_node_is_found_under_no_other():
    """A sequence's own first block stays out of the tree where a twin's is there: when the twin is evicted, what
    follows in the tree hangs under nobody, whatever is put there later."""
    pool = BlockPool(8, 1)
    twin, other, *own = pool.take(4)
    node, gone = pool.commit(ROOT, (1,), twin), pool.commit(ROOT, (2,), other)
    below = pool.commit(node, (3,), own[0])
    pool.commit(below, (4,), own[1])
    pool.release([twin])
    pool.release([other])
    fresh = pool.take(6)
    assert {twin, other} <= set(fresh) and not pool.known(twin) and gone != node
    for token, block in enumerate(fresh[:3], 5):
        pool.commit(ROOT, (token,), block)
        for child in (3, 4):
            assert pool.match([token, child], 2) == [block]


def test_idle_blocks_of_a_prefix_are_not_counted_as_room_for_the_rest():
    """Of ten blocks, somebody holds four and four more are an idle prefix: who begins with it cannot have three
    besides, though six are available before its own prefix is held. Somebody with two besides would leave no block
    in hand for the one who runs."""
    memory = Memory(slots=4, blocks=10, block_size=2, context=40)

    def waiting(tokens: list[int]) -> Sequence:
        return Sequence(Request("x", tokens, GREEDY), 0, GREEDY, tokens, 40, 0)

    prefix = [*range(8)]
    first, other = waiting([*prefix, 9]), waiting([20, *range(7)])
    assert memory.admit(first) and memory.reserve([(first, 9)]) == 0
    memory.advance(first, 9)
    memory.release(first)
    assert memory.admit(other) and memory.reserve([(other, 8)]) == 0
    assert (memory.pool.held, memory.pool.available) == (4, 6)
    assert not memory.admit(waiting([*prefix, *range(30, 36)]))
    assert not memory.admit(waiting([*prefix, *range(30, 34)]))
    assert memory.admit(waiting([*prefix, 30, 31]))


@pytest.mark.parametrize("harm", ["_holders", "_free", "_idle", "_tree"])
def test_the_pool_s_check_notices(harm):
    pool = BlockPool(6, 2)
    blocks = pool.take(3)
    pool.commit(pool.commit(ROOT, (1, 2), blocks[0]), (3, 4), blocks[1])
    pool.release(blocks[:1])
    pool.check([blocks[1:]])
    books = getattr(pool, harm)
    if harm == "_holders":
        books[blocks[2]] += 1
    elif harm == "_free":
        books.append(blocks[1])
    else:
        books.clear()
    with pytest.raises(InvariantError):
        pool.check([blocks[1:]])
