"""Who is said to be lost: to all processes the same, whichever it is and however it went."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from penstock.core.errors import PenstockError, UsageError
from penstock.parallel import watch
from penstock.parallel.watch import Loss, LossError
from penstock.parallel.world import World
from penstock.testing.ranks import ranks
from penstock.train.session import stoppable


def watched(world: World) -> watch.Watch:
    assert world.watch is not None
    return world.watch


def losing(lost: int, end: Callable[[], object]) -> Callable[[World], None]:
    """The process ``lost`` does ``end`` before the others meet it."""

    def work(world: World) -> None:
        world.barrier()
        if world.rank == lost:
            end()
        world.barrier()

    return work


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_process_that_is_killed_is_named_by_all(lost):
    results = ranks(3, losing(lost, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert results[lost] == {}
    for rank in {0, 1, 2} - {lost}:
        kind, message = results[rank]["raised"]
        assert kind == "LossError"
        assert message.startswith(f"rank {lost} has ended without a word\n")
        assert results[rank]["after"] < 60


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_gives_no_sign_of_life(lost, monkeypatch):
    """Stopped: nothing of it closes, and whoever waits in an exchange of all has an hour's patience."""
    monkeypatch.setattr(watch, "BEAT", 0.1)

    def work(world: World) -> str:
        own = watched(world)
        own.patience = 0.5
        (fellow,) = agreed_pids(world, lost)
        if world.rank == lost:
            os.kill(os.getpid(), signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while own.loss is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(fellow, signal.SIGKILL)
        assert own.loss is not None
        return own.loss.what

    results = ranks(2, work)
    assert results[1 - lost]["returned"] == f"rank {lost} does not answer"


def agreed_pids(world: World, lost: int) -> list[int]:
    """The process that ``lost`` is, known to all."""
    return [int(world.largest(os.getpid() if world.rank == lost else 0)[0])]


def test_who_waits_for_whom_leads_to_the_one_that_does_not_wait():
    """Rank 0 waits for 1, that one for 2, and 2 is busy with something else; all learn the same."""

    def work(world: World) -> str:
        own = watched(world)
        if world.rank == 2:
            while own.loss is None:
                time.sleep(0.02)
            return own.loss.what
        return own.waited(world.rank + 1, f"its task {world.rank + 1}", 0.5).what

    wanted = "rank 2 does not answer: its task 2 was waited for"
    assert [result["returned"] for result in ranks(3, work)] == [wanted] * 3


@pytest.mark.parametrize(("error", "wanted"), [(PenstockError, "rank 1: it is wrong"), (UsageError, "it is wrong")])
def test_of_processes_that_fail_the_first_is_named_to_all(error, wanted):
    """Its own error, with its hint and exit code, also to one that fails for another reason later; a wrong request,
    which is the same for all, without a name."""

    def work(world: World) -> list[object]:
        own = watched(world)
        if world.rank == 1:
            loss = own.failed(error("it is wrong", hint="Use another one."))
        else:
            while own.loss is None:
                time.sleep(0.02)
            loss = own.failed(KeyError("later"))
        return [str(LossError(loss)), LossError(loss).exit_code, loss.rank, own.tells(loss)]

    told = [result["returned"] for result in ranks(3, work)]
    assert told == [[f"{wanted}\nUse another one.", error.exit_code, 1, rank == 1] for rank in range(3)]


def test_an_end_that_was_agreed_upon_is_no_loss():
    """And junk from elsewhere is none either."""

    def work(world: World) -> bool:
        port = dist.distributed_c10d._get_default_store().get("penstock/watch").decode().split()[0]
        with socket.create_connection(("127.0.0.1", int(port))) as stranger:
            stranger.sendall(b'{"rank": 1, "host": 0, "password": "guessed"}\n\xff\n')
        world.barrier()
        watched(world).leave()
        return watched(world).loss is None

    assert [result["returned"] for result in ranks(2, work)] == [True, True]


@pytest.mark.parametrize(
    ("loss", "tellers"),
    [
        (Loss(5, 4, "killed"), [0, 4, 8]),
        (Loss(4, 4, "killed"), [0, 5, 8]),
        (Loss(5, 4, "failed", told=True), [0, 5, 8]),
        (Loss(None, 0, "all wait"), [0, 4, 8]),
    ],
)
def test_one_process_of_each_host_tells(loss, tellers):
    """On three hosts of four processes: the one that failed, else the lowest that is left."""
    assert [loss.teller(host) for host in (0, 4, 8)] == tellers


def test_the_end_of_a_run_that_lost_a_process_is_no_wish_of_the_user(tmp_path, capsys):
    """torchrun sends SIGTERM to all others when one is killed; that is not taken for Ctrl-C."""
    lost = SimpleNamespace(loss=Loss.ended(1, 0))
    with pytest.raises(LossError, match="rank 1 has ended without a word"), stoppable(tmp_path, World(0, 2, 0, lost)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert capsys.readouterr().out == ""
