from __future__ import annotations

import itertools
import threading
import time

import pytest

from penstock.data.ahead import map_ahead


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("penstock-ahead")]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "waited for a hundred seconds"
        time.sleep(0.001)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_gives_what_map_gives(threads, count):
    def slow_square(x: int) -> int:
        time.sleep(0.001 * (x % 3))
        return x * x

    assert list(map_ahead(slow_square, range(count), threads=threads, depth=3)) == [x * x for x in range(count)]
    assert not workers()


def test_works_ahead_but_only_so_far():
    done: list[int] = []
    results = map_ahead(done.append, itertools.count(), threads=1, depth=3)
    for given in range(1, 5):
        next(results)
        wait_until(lambda given=given: len(done) == given + 3)
        time.sleep(0.01)
        assert len(done) == given + 3
    results.close()
    assert not workers()


def test_an_exception_of_the_function_comes_in_its_turn():
    results = map_ahead(lambda x: 1 // (3 - x), itertools.count(), threads=2, depth=5)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not workers()


def test_an_exception_of_the_items_ends_it():
    def items():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(map_ahead(abs, items(), threads=2, depth=5))
    assert not workers()


def test_closing_drops_what_has_not_begun():
    done: list[int] = []
    gate = threading.Event()

    def first_then_wait(x: int) -> None:
        done.append(x)
        if x:
            gate.wait(10)

    results = map_ahead(first_then_wait, itertools.count(), threads=1, depth=8)
    next(results)
    wait_until(lambda: len(done) == 2)
    threading.Timer(0.05, gate.set).start()
    results.close()
    assert done == [0, 1]


def test_an_abandoned_iterator_leaves_no_thread():
    results = map_ahead(abs, itertools.count(), threads=2, depth=2)
    next(results)
    assert workers()
    del results
    assert not workers()
