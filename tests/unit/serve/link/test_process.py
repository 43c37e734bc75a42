"""What the engine's process does with a request that cannot be taken in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from penstock.core.errors import UsageError
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.link import process
from penstock.serve.link.host import Host
from penstock.serve.link.process import _take
from penstock.serve.link.wire import Refused
from penstock.serve.messages import Request


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("the prompt is too long"), Refused("a", "the prompt is too long")),
        (RuntimeError("no such grammar"), Refused("a", "RuntimeError: no such grammar", defect=True)),
    ],
)
def test_it_is_refused_and_the_engine_goes_on(error, said):
    told, aborted = [], []

    class Engine:
        def add(self, request):
            raise error

        def abort(self, id, index=None):
            aborted.append(id)

    class Channel:
        def send(self, message):
            told.append(message)

    _take(Host(Engine(), "m"), Request("a", [1], SamplingParams()), Channel())
    assert told == [said]
    assert aborted == ["a"] * said.defect  # what it had taken in already


def test_who_has_lost_a_rank_says_so_and_ends_behind_the_others(monkeypatch):
    order = []
    monkeypatch.setattr(process.os, "_exit", lambda code: order.append(f"exit {code}"))
    channel = SimpleNamespace(send=lambda message: order.append(message.what))
    ranks = SimpleNamespace(bury=lambda: order.append("the others end"))
    process._end(UsageError("rank 1 does not answer"), channel, ranks)
    assert order == ["rank 1 does not answer", "the others end", f"exit {UsageError.exit_code}"]
