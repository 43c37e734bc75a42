"""Who of a run's processes was lost first, and how: all of them learn the same at once.

When one process ends, its neighbours' exchanges fail, then those of their neighbours; from an error of gloo or NCCL
nobody can tell which process was the first. So each keeps a line, a TCP connection, to the :class:`_Desk` in the
process of rank 0. The kernel closes the line of a process that is killed; one that fails says so before it closes
anything; one that is stopped falls silent; and of those that wait in vain, each says for whom. The desk decides once
who was lost, and tells all. Where it is rank 0 itself, all lines break, and that says it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from penstock.core.errors import PenstockError, UsageError

#: Seconds between two signs of life on a line.
BEAT = 5.0

#: Seconds that the processes which have learnt of a loss have for ending by themselves.
GRACE = 30.0

#: Seconds for the desk's answer, beyond those that it is given to wait for others.
ANSWER = 5.0

#: Where the run's store has the port and the password of the desk.
_KEY = "penstock/watch"


@dataclasses.dataclass(frozen=True)
class Loss:
    """The first process that was lost.

    Attributes:
        rank: of it; None where all processes wait for each other.
        host: the lowest rank on its host.
        what, hint: as in :class:`PenstockError`.
        told: whether it could say itself what was wrong.
        code: the exit code of the processes.
    """

    rank: int | None
    host: int
    what: str
    hint: str = ""
    told: bool = False
    code: int = 1

    @classmethod
    def ended(cls, rank: int, host: int) -> Loss:
        """Its process is gone, and has said nothing."""
        hint = (
            "A process that ends so was killed, most often for want of memory (see the system's log or the job "
            "scheduler's), or has crashed. Continue from the newest checkpoint with: penstock train --resume RUN"
        )
        return cls(rank, host, f"rank {rank} has ended without a word", hint)

    @classmethod
    def silent(cls, rank: int, host: int, patience: float, awaited: str = "") -> Loss:
        """Its process is there, but does not answer."""
        what = f"rank {rank} does not answer" + (f": {awaited} was waited for" if awaited else "")
        hint = (
            f"It hangs, is stopped or cannot be reached. A process counts as lost after {patience:g} s (in a pipeline, "
            "pipeline.timeout). Continue from the newest checkpoint with: penstock train --resume RUN"
        )
        return cls(rank, host, what, hint)

    def teller(self, host: int) -> int:
        """The rank that prints the error on ``host``: the lost one if it can, else the host's lowest."""
        if host == self.host and self.rank is not None:
            return self.rank if self.told else host + (self.rank == host)
        return host


class LossError(PenstockError):
    """A process of the run was lost, which one ``loss`` says."""

    def __init__(self, loss: Loss) -> None:
        # A wrong request is the same in all of them, and no fault of the one that was the first to say so.
        named = loss.told and loss.code != UsageError.exit_code
        super().__init__(f"rank {loss.rank}: {loss.what}" if named else loss.what, hint=loss.hint)
        self.loss = loss
        self.exit_code = loss.code


class Watch:
    """This process's line to the desk.

    Args:
        rank, size, local_rank: this process's place.
        address: a host on which rank 0 can be reached.

    Attributes:
        patience: seconds after which a process that gives no sign of life counts as lost.

    Raises:
        OSError: the desk cannot be reached.
    """

    def __init__(self, rank: int, size: int, local_rank: int, address: str) -> None:
        self.rank, self.host, self.patience = rank, rank - local_rank, 300.0
        store = dist.distributed_c10d._get_default_store()
        if rank == 0:
            desk = _Desk(size, self)
            store.set(_KEY, f"{desk.port} {desk.password}")
            threading.Thread(target=desk.serve, name="penstock-desk", daemon=True).start()
        port, password = store.get(_KEY).decode().split()
        self._line = _Line(socket.create_connection((address, int(port)), timeout=60))
        self._line.send(rank=rank, host=self.host, password=password)
        os.register_at_fork(after_in_child=self._line.socket.close)  # a child that lives on would keep the line open
        self._loss: Loss | None = None
        #: That a process is lost, that the work is done, and one of both.
        self._known, self._over, self._settled = threading.Event(), threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="penstock-watch", daemon=True).start()

    @property
    def loss(self) -> Loss | None:
        """The process that was lost, as far as is known."""
        return self._loss

    def lost(self) -> Loss | None:
        """Waits until a process is lost, which one this says, or until the work is done: then it is None."""
        self._settled.wait()
        return self._loss

    def too_long(self, beats: int) -> bool:
        """Whether a process that gave no sign of life at so many beats counts as lost."""
        return beats * BEAT > max(self.patience, 2 * BEAT)

    def tells(self, loss: Loss) -> bool:
        """Whether this process is the one on its host that prints the error."""
        return loss.teller(self.host) == self.rank

    def failed(self, error: BaseException) -> Loss:
        """Says that this process fails with ``error``; returns the first loss, which may be another one."""
        what, hint = (error.what, error.hint) if isinstance(error, PenstockError) else (f"{error!r}", "")
        code = getattr(error, "exit_code", 1)
        self._line.send(failed=what, hint=hint, code=code)
        return self._awaited(ANSWER)

    def waited(self, peer: int | None, what: str, patience: float) -> LossError:
        """The error for ``what`` of ``peer`` not coming, or, where that is None, something of all processes.

        Those that give up say so here, within ``patience`` seconds of each other. From one to the next that it waited
        for, this leads to the one that did not give up.
        """
        self._line.send(waits=peer, what=what, patience=patience)
        return LossError(self._awaited(patience + ANSWER))

    def end_too(self, tell: Callable[[PenstockError], None]) -> None:
        """From now on, ends this process too, a while after a loss: it may wait for the lost one for an hour."""

        def end() -> None:
            self._known.wait()
            time.sleep(GRACE)
            loss = self._awaited(0)
            if self.tells(loss):
                tell(LossError(loss))
            os._exit(loss.code)

        threading.Thread(target=end, name="penstock-end", daemon=True).start()

    def leave(self) -> None:
        """Ends the watch when the work is done. All processes call it, after they have met for the last time."""
        self._line.send(done=True)
        if self._loss is None:
            self._over.wait(ANSWER)

    def close(self) -> None:
        """Ends the watch of a process that goes on after a loss."""
        self._line.socket.close()

    def _awaited(self, seconds: float) -> Loss:
        self._known.wait(seconds)
        return self._loss or Loss.silent(0, 0, self.patience)  # since the desk never takes long

    def _listen(self) -> None:
        """Follows what the desk says."""
        silent, selector = 0, selectors.DefaultSelector()
        selector.register(self._line.socket, selectors.EVENT_READ)
        while self._loss is None:
            if not selector.select(BEAT):
                silent += 1
                if self.too_long(silent):
                    self._loss = Loss.silent(0, 0, self.patience)
                self._line.send()
                continue
            silent, messages = 0, self._line.receive()
            if messages is None:
                self._loss = Loss.ended(0, 0)
            for message in messages or ():
                if "over" in message:
                    self._over.set()
                    self._settled.set()
                    return
                if "what" in message:
                    self._loss = Loss(**message)
        self._known.set()
        self._settled.set()


class _Line:
    """A connection with messages of one line of JSON each."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(60)
        self.socket, self._rest, self._lock = connection, b"", threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message; an empty one is a sign of life. Where the line is broken, whoever reads it sees that."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, at least a part of one; None at the end of the line, or of sense in it."""
        try:
            data = self.socket.recv(65536)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return messages if data and len(self._rest) < 65536 and all(isinstance(m, dict) for m in messages) else None


@dataclasses.dataclass
class _Caller:
    """A process at the desk, known once it has given the password."""

    line: _Line
    rank: int = -1
    host: int = 0
    heard: bool = True
    silent: int = 0


class _Desk:
    """Where all lines end: decides who was lost first, and tells all."""

    def __init__(self, size: int, watch: Watch) -> None:
        self._size, self._watch = size, watch
        self.password = secrets.token_hex(16)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._callers: dict[int, _Caller] = {}
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=min(size, 4096))
        self.port: int = self._server.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        os.register_at_fork(after_in_child=self._close)
        self._done: set[int] = set()
        self._waits: dict[int, tuple[int | None, str]] = {}
        self._deadline = float("inf")
        self._loss: Loss | None = None

    def _close(self) -> None:
        for opened in (self._server, *(caller.line.socket for caller in self._callers.values())):
            opened.close()

    def serve(self) -> None:
        """Serves all lines until the run is over, or, after a loss, until they are closed."""
        beat = time.monotonic() + BEAT
        while len(self._done) < self._size and (self._loss is None or len(self._selector.get_map()) > 1):
            until = beat if self._loss else min(beat, self._deadline)
            for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
                if key.fileobj is self._server:
                    connection, _ = self._server.accept()
                    self._selector.register(connection, selectors.EVENT_READ, _Caller(_Line(connection)))
                else:
                    self._hear(key.data)
            if time.monotonic() > self._deadline and not self._loss:
                self._decide()
            if time.monotonic() > beat:
                self._beat()
                beat = time.monotonic() + BEAT
        self._tell(over=True)
        if self._loss is not None:
            self._close()

    def _hear(self, caller: _Caller) -> None:
        messages = caller.line.receive()
        caller.heard = True
        if messages is None:
            self._drop(caller)
            if caller.rank >= 0 and caller.rank not in self._done:
                self._settle(Loss.ended(caller.rank, caller.host))
            return
        for message in messages:
            if caller.rank < 0:
                if message.get("password") != self.password:  # somebody from elsewhere
                    self._drop(caller)
                    return
                caller.rank, caller.host = message["rank"], message["host"]
                self._callers[caller.rank] = caller
                if self._loss is not None:
                    caller.line.send(**dataclasses.asdict(self._loss))
            elif "done" in message:
                self._done.add(caller.rank)
            elif "failed" in message:
                loss = Loss(
                    caller.rank, caller.host, message["failed"], message["hint"], told=True, code=message["code"]
                )
                self._settle(loss)
            elif "waits" in message:
                self._waits[caller.rank] = message["waits"], message["what"]
                self._deadline = min(self._deadline, time.monotonic() + message["patience"])

    def _drop(self, caller: _Caller) -> None:
        self._selector.unregister(caller.line.socket)
        caller.line.socket.close()

    def _beat(self) -> None:
        """Gives and counts signs of life. Counted are beats, not seconds: where all of a run was stopped for a while,
        only one has passed."""
        for caller in list(self._callers.values()):
            caller.silent, caller.heard = (0 if caller.heard else caller.silent + 1), False
            if self._watch.too_long(caller.silent):
                self._settle(Loss.silent(caller.rank, caller.host, self._watch.patience))
        self._tell()

    def _decide(self) -> None:
        """Finds the loss from who waited for whom."""
        first = next(iter(self._waits))
        seen: list[int] = [first]
        peer, what = self._waits[first]
        while peer is not None and peer in self._waits and peer not in seen:
            seen.append(peer)
            peer, what = self._waits[peer]
        if peer is None:  # waits for all: those that do not wait themselves
            others = [rank for rank in range(self._size) if rank not in self._waits]
            peer = others[0] if len(others) == 1 else None
            if peer is None:
                whom = " and ".join(map(str, others))
                what = f"ranks {whom} do not answer" if others else "all processes wait for each other"
                self._settle(Loss(None, 0, what, Loss.silent(0, 0, self._watch.patience).hint))
                return
        self._settle(Loss.silent(peer, self._callers[peer].host, self._watch.patience, what))

    def _settle(self, loss: Loss) -> None:
        if self._loss is None:
            self._loss = loss
            self._tell(**dataclasses.asdict(loss))

    def _tell(self, **message: Any) -> None:
        """Tells all, and last of all this process, which may end as soon as it knows."""
        for rank in sorted(self._callers, reverse=True):
            self._callers[rank].line.send(**message)
