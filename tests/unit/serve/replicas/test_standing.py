"""What an engine that is started later is told."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from penstock.serve.messages import Act, Control
from penstock.serve.replicas.standing import Standing

#: What operators may say, in any order.
SAYINGS = [
    (Act.LOAD, "other", 7, ""),
    (Act.DROP_ADAPTER, "", None, "a"),
    (Act.LOAD_ADAPTER, "second", None, "a"),
    (Act.LOAD_ADAPTER, "third", None, "b"),
    (Act.PAUSE, "", None, ""),
    (Act.SLEEP, "", None, ""),
    (Act.WAKE, "", None, ""),
]


class State:
    """What an engine comes to by what it is told."""

    def __init__(self) -> None:
        self.adapters, self.weights, self.paused, self.asleep = {"a": "first"}, ("own", 0), False, False

    def take(self, control: Control) -> None:
        match control.act:
            case Act.LOAD:
                assert not self.asleep
                self.weights = (control.folder, control.version)
            case Act.LOAD_ADAPTER:
                assert control.name not in self.adapters
                self.adapters[control.name] = control.folder
            case Act.DROP_ADAPTER:
                del self.adapters[control.name]
            case Act.PAUSE | Act.RESUME:
                self.paused = control.act is Act.PAUSE
            case Act.SLEEP | Act.WAKE:
                self.asleep = control.act is Act.SLEEP


@pytest.mark.parametrize("length", [1, 2, 4])
def test_it_comes_to_the_same_as_one_that_was_there_all_the_time(length):
    for sayings in itertools.permutations(SAYINGS, length):
        old, standing = State(), Standing({"a": Path("first")}, {"a": "first"})
        for act, folder, version, name in sayings:
            try:
                old.take(Control("", act, folder, version, name))
            except (AssertionError, KeyError):  # engines refuse it
                continue
            standing.take(act, folder, version, name, folder)
        new = State()
        for each in standing.acts():
            new.take(each)
        assert vars(new) == vars(old)
        assert standing.keys == old.adapters
