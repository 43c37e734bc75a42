"""The other ranks, as the first one knows them: processes that it starts, tells what to do, and ends."""

from __future__ import annotations

import contextlib
import datetime
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from penstock.core.channel import Channel
from penstock.core.errors import PenstockError, UsageError
from penstock.models.shares import Share
from penstock.parallel.tensor import ExchangeError
from penstock.parallel.watch import Loss, LossError, Watch
from penstock.parallel.world import World
from penstock.serve.ranks.wire import Do, Done, Follow, Message, Refusal, body, parse
from penstock.serve.sizing import explained_shortage

log = logging.getLogger(__name__)

#: How long ranks wait for each other within a step.
PATIENCE = datetime.timedelta(minutes=5)

#: Seconds of silence after which a rank that is stopped counts as lost, those that an ending one may take, and those
#: that it may take where this process ends, too, for which a front end waits some seconds.
SILENCE, GRACE, LAST = 60.0, 5.0, 2.0


class RankLostError(PenstockError):
    """A rank was lost, or has failed, while it was needed."""


def start(end: int) -> subprocess.Popen[bytes]:
    """Starts the process of a rank, which gets the file descriptor ``end`` of a socket pair."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "penstock.serve.link.follower", str(end)],
        pass_fds=[end],
        stdin=subprocess.DEVNULL,
    )


def store(size: int, port: int | None = None) -> dist.TCPStore:  # type: ignore[name-defined]
    """The store in which ``size`` ranks meet: a new one, or the one at a ``port``."""
    kind = dist.TCPStore  # type: ignore[attr-defined]
    if port is None:
        return kind("127.0.0.1", 0, world_size=size, is_master=True, wait_for_workers=False)
    return kind("127.0.0.1", port, world_size=size, is_master=False)


def met(share: Share, store: dist.TCPStore) -> World:  # type: ignore[name-defined]
    """The world of the ranks, once all of them are there.

    Raises:
        PenstockError: they cannot reach each other.
    """
    world = World.meet(share.rank, share.size, store, PATIENCE)
    assert world.watch is not None
    world.watch.patience = SILENCE
    return world


@contextlib.contextmanager
def blaming(watch: Watch) -> Iterator[None]:
    """Within the block an exchange may fail, for which this finds out who is lost; and memory may be short.

    Raises:
        LossError: a rank was lost.
        PenstockError: the device has no memory left.
    """
    try:
        with explained_shortage():
            yield
    except ExchangeError as error:
        raise watch.waited(None, "a step", patience=2.0) from error


class Ranks:
    """The ranks beside the first one, which is this process. All that is to be done together is done in the order in
    which they are told; a rank that is lost or fails, be it this one, ends the work of all.

    Args:
        share: this process's.
        channels: to each of the others.
        processes: of each of them, as far as this process has started them.
        world: all of them, once they have met.

    Attributes:
        share: as given.
        memory: bytes of the others' devices by what they are for, once they have said it.
    """

    def __init__(
        self,
        share: Share,
        channels: Sequence[Channel[Message]],
        processes: Sequence[subprocess.Popen[bytes]] = (),
        world: World | None = None,
    ) -> None:
        self.share, self.memory = share, list[dict[str, int]]()
        self._channels, self._processes, self._world = [*channels], [*processes], world
        self._store: Any = None
        self._failure: RankLostError | None = None
        self._ending: threading.Thread | None = None
        self._threads = torch.get_num_threads()

    @classmethod
    def start(cls, size: int, model: str, config: str, device: torch.device) -> Self:
        """Starts the others of ``size`` ranks, which begin to load their shares.

        Args:
            model: the folder of the model that they divide.
            config: an EngineConfig as JSON.
            device: this rank's; on CUDA each has the device with the number of its rank.

        Raises:
            UsageError: there are fewer devices than ranks.
            PenstockError: this process is in a process group already.
        """
        _check(size, device)
        channels, processes = [], []
        for _ in range(1, size):
            ours, theirs = socket.socketpair()
            with theirs:
                processes.append(start(theirs.fileno()))
            channels.append(Channel(ours, body, parse))
        ranks = cls(Share(0, size), channels, processes)
        ranks._store = store(size)
        for rank, channel in enumerate(channels, 1):
            where = f"cuda:{rank}" if device.type == "cuda" else str(device)
            channel.send(Follow(rank, size, model, config, where, ranks._store.port))
        if device.type == "cpu":  # which all ranks share
            torch.set_num_threads(max(1, ranks._threads // size))
        return ranks

    def meet(self) -> None:
        """Waits until all have loaded their shares, and joins them.

        Raises:
            PenstockError: one of them cannot; it says which one, and why.
        """
        self._heard()
        self._world = met(self.share, self._store)
        self._ending = threading.Thread(target=self._end_all, name="penstock-abort", daemon=True)
        self._ending.start()

    def tell(self, what: str, *arguments: Any) -> None:
        """Lets the others do what this one does now.

        Raises:
            RankLostError: a rank was lost.
        """
        self.require()
        for channel in self._channels:
            channel.send(Do(what, list(arguments)))

    def require(self) -> None:
        """Checks that no rank has been lost so far.

        Raises:
            RankLostError: one has been.
        """
        if self._failure is not None:
            raise self._failure
        if self._watch.loss is not None:
            raise _lost(self._watch.loss)

    @property
    def lost(self) -> bool:
        """Whether one of them is, as far as is known, or all have been closed."""
        return self._world is None or self._failure is not None or self._watch.loss is not None

    def ask_memory(self) -> None:
        """Asks the others what the memory of their devices is for."""
        with self.together():
            self.tell("describe")
            self.memory = [each.memory for each in self._heard()]

    def load_adapter(self, slot: int, folder: Path, key: bytes) -> None:
        """Lets the others load the adapter of ``folder`` into ``slot``, too, and waits until they have. What this rank
        has read there has the ``key``.

        Raises:
            PenstockError: one of them cannot, or has read something else.
        """
        with self.together():
            self.tell("load_adapter", slot, str(folder))
            answers = [*self._answers()]
        for rank, answer in enumerate(answers, 1):
            if _done(rank, answer).key != key:
                raise PenstockError(
                    f"the adapter {folder} has changed while ranks read it: rank {rank} has another one than rank 0",
                    hint="Load it again.",
                )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within the block this rank does what the others do too. Where it raises something, they would wait for it in
        vain: they learn of it, and all end.

        Raises:
            RankLostError: a rank was lost or has failed, perhaps this one.
        """
        try:
            self.require()
            with blaming(self._watch):
                yield
        except BaseException as error:
            self._failure = self._found(error)
            self.close()
            if error is self._failure or not isinstance(error, Exception):
                raise
            raise self._failure from error

    def _found(self, error: BaseException) -> RankLostError:
        """Why all end after ``error`` here, which they are told."""
        if isinstance(error, RankLostError):
            return error
        if isinstance(error, LossError):
            return _lost(error.loss)
        if isinstance(error, Exception) and not isinstance(error, PenstockError):  # nobody foresaw it
            log.error("rank %d has failed", self.share.rank, exc_info=error)
        return _lost(self._watch.failed(error))

    def watch(self, tell: Callable[[PenstockError], None]) -> None:
        """Calls ``tell`` from another thread once a rank is lost: this one may wait for it in vain."""
        watch = self._watch

        def wait() -> None:
            loss = watch.lost()
            if loss is not None:
                tell(_lost(loss))

        threading.Thread(target=wait, name="penstock-ranks", daemon=True).start()

    def bury(self) -> None:
        """Once a rank is lost, sees to it that no other one stays behind this process: one that was stopped would."""
        _end(self._processes, LAST)

    def _end_all(self) -> None:
        """Once a rank is lost, ends what waits for it: on the device, where NCCL itself would for minutes, and then end
        this process; and the others, which may not notice, and for which this one may wait."""
        if self._watch.lost() is None:
            return
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            with contextlib.suppress(RuntimeError, ValueError):
                dist.distributed_c10d._abort_process_group()
        _end(self._processes)

    def _wait_for_end(self) -> None:
        if self._ending is not None:
            self._ending.join((1 + len(self._processes)) * GRACE)

    @property
    def _watch(self) -> Watch:
        assert self._world is not None and self._world.watch is not None, "the ranks have not met"
        return self._world.watch

    def _heard(self) -> list[Done]:
        """What each of them answers.

        Raises:
            PenstockError: one of them refuses.
        """
        return [_done(rank, answer) for rank, answer in enumerate(self._answers(), 1)]

    def _answers(self) -> Iterator[Done | Refusal]:
        """The same, or that it refuses."""
        for rank, channel in enumerate(self._channels, 1):
            answer = channel.receive()
            if not isinstance(answer, Done | Refusal):
                if self._world is not None:
                    raise self._watch.waited(None, "an answer", patience=2.0)
                raise RankLostError(f"rank {rank} {self._end_of(rank)} while it was opened")
            yield answer

    def _end_of(self, rank: int) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._processes[rank - 1].wait(GRACE)
            return f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
        return "has closed its connection"

    def close(self) -> None:
        """Ends all of them, and leaves their group; again, it does nothing."""
        lost = self._world is not None and (self._failure is not None or self._watch.loss is not None)
        if self._world is not None and not lost:
            with contextlib.suppress(PenstockError, RuntimeError):
                self.tell("leave")
                self._world.leave()
        for channel in self._channels:
            channel.close()
        if lost and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._wait_for_end()  # two threads must not leave the group at a time
        if self._world is not None and dist.is_initialized():
            dist.destroy_process_group()  # which those notice that wait on the CPU
        if lost:
            self._wait_for_end()
            self._watch.close()
        self._world = None
        _end(self._processes)
        torch.set_num_threads(self._threads)
        self._processes, self._channels = [], []


def _end(processes: Sequence[subprocess.Popen[bytes]], patience: float = GRACE) -> None:
    """Waits some seconds for ``processes``, which are about to end, and kills those that do not."""
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _check(size: int, device: torch.device) -> None:
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if size > there:
            raise UsageError(
                f"{size} ranks need as many devices, and there are {there}",
                hint=f"Divide the model among {there} or fewer.",
            )
        if device.index:
            raise UsageError(f"ranks take the first {size} devices, and not {device}", hint="Leave the device out.")
    if dist.is_initialized():
        raise PenstockError(
            "this process is in a process group of torch.distributed already, and can be in one only",
            hint="Open the model in a process of its own.",
        )


def _done(rank: int, answer: Done | Refusal) -> Done:
    """The ``answer`` of ``rank``, unless it refuses, which is an error of this one."""
    if isinstance(answer, Refusal):
        kind = UsageError if answer.exit_code == UsageError.exit_code else PenstockError
        raise kind(f"rank {rank}: {answer.what}", hint=answer.hint)
    return answer


def _lost(loss: Loss) -> RankLostError:
    # What to do about a rank that could not say it is not what a training run would do.
    told = loss.hint if loss.told else ""
    return RankLostError(LossError(loss).what, hint=told or "The engine needs all of its ranks: start it again.")
