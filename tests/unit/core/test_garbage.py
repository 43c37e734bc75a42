"""What is there when a process settles is not looked through again; what comes later is collected as ever."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from penstock.core.garbage import loading, settle, settled


class Ring:
    """An object that nothing but a collection frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_there_is_left_alone_and_what_comes_is_not():
    garbage = weakref.ref(Ring())
    kept = Ring()
    settle()
    assert garbage() is None
    assert not any(each is kept for each in gc.get_objects())
    later = weakref.ref(Ring())
    gc.collect()
    assert later() is None


def test_settling_can_be_for_a_while():
    kept = Ring()
    with pytest.raises(KeyError), settled():
        assert not any(each is kept for each in gc.get_objects())
        raise KeyError
    assert any(each is kept for each in gc.get_objects())


def test_nothing_is_collected_while_a_program_loads():
    before = [each["collections"] for each in gc.get_stats()]
    with loading():
        assert not gc.isenabled()
        kept = [Ring() for _ in range(3 * gc.get_threshold()[0])]
        assert [each["collections"] for each in gc.get_stats()] == before
    assert gc.isenabled()
    assert not any(each is kept[0] for each in gc.get_objects())
