"""A server from start to end: engine, endpoints, signals."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.models.encoders.folder import is_encoder
from penstock.serve.chat import take_template
from penstock.serve.config import EngineConfig
from penstock.serve.dialogue.contract import Dialogue
from penstock.serve.embed.judge import Judge, open_judge
from penstock.serve.embed.pair_template import PairTemplate, open_template, writes_pairs
from penstock.serve.http.app import make_app
from penstock.serve.http.connection import Connection, quietly, room
from penstock.serve.http.errors import ApiError
from penstock.serve.http.service import Limits, Service
from penstock.serve.http.text import Tokens
from penstock.serve.link.client import EngineClient, Watcher
from penstock.serve.link.starting import Starting
from penstock.serve.replicas.config import Replication
from penstock.serve.replicas.replicas import Replicas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Connections that wait to be accepted.
QUEUE = 2048

#: Seconds after which a peer that does not answer is gone, with and without data on the way to it.
VANISHED = 120

#: Seconds for answers that are on their way when the engine dies, or the time to drain is over.
LAST_WORDS = 1.0


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or Ctrl-C: takes no more requests, and ends when those under way have. After the
    limit's time, or at a second signal, those that are left are told that it is over."""

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._announce = service, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            # Of several that asyncio accepts in a row, each that fails would be one more to try again.
            listener.listen(QUEUE)
        self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Uvicorn would raise the signal again at the end; here a drained server has ended well.
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._drain)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _drain(self) -> None:
        wait = 0.0 if self.should_exit else self._service.limits.drain
        asyncio.get_running_loop().call_later(wait, self._cut)
        self.should_exit = self._service.draining = True

    def _cut(self) -> None:
        self._service.engine.abandon(ApiError(503, "the server ends, and this request with it", code="server_ends"))


async def serve(
    model: str,
    engine: EngineConfig,
    replication: Replication,
    *,
    device: str,
    name: str,
    listener: socket.socket,
    keys: Collection[str],
    local: bool,
    limits: Limits,
    chat_template: Path | None,
    dialogue: Dialogue | None,
    guest_templates: bool,
    strict: bool,
    control: bool,
    rerank_template: Path | None,
    rerank_answers: tuple[str, str] | None,
    started: Callable[[Service], None],
    watchers: Sequence[Watcher] = (),
    starting: Starting | None = None,
) -> None:
    """Serves ``model`` on ``listener``, a bound socket, until a signal ends it.

    Args:
        replication: how many engines with the model there are.
        name: what clients call it.
        keys, local: see :class:`~penstock.serve.http.guard.Guard`.
        chat_template: a file to take in place of the model's own.
        dialogue: how the model writes thoughts and calls; guessed from the template if not given.
        guest_templates: let requests bring a chat template of their own.
        strict: refuse requests with fields that are not known.
        control: let clients pause the engine, and give it other weights.
        rerank_template, rerank_answers: how a decoder judges pairs, where its folder does not say so; see
            :func:`~penstock.serve.embed.judge.open_judge`.
        started: is called when it takes requests.
        watchers: see the engine's decisions.
        starting: the process of the engine, where it was started already and there is one.

    Raises:
        PenstockError: the model cannot be had, or does not fit.
        EngineDiedError: the engine died meanwhile.
    """
    folder = hub.resolve(model)
    opening: Coroutine[None, None, EngineClient | Replicas] = (
        EngineClient.open(str(folder), engine, device, limits.patience, starting=starting)
        if replication.replicas == 1
        else Replicas.open(str(folder), engine, replication, device, limits.patience)
    )
    client, tokenizer = await asyncio.gather(opening, asyncio.to_thread(hub.load_tokenizer, folder))
    try:
        judge = _judge(folder, tokenizer, rerank_template, rerank_answers)
        if chat_template is not None:
            take_template(tokenizer, chat_template)
        tokens = Tokens(tokenizer, dialogue, guest_templates)
        service = Service(name, tokens, client, limits, strict, control, judge)
        client.watchers += watchers
        app = make_app(service, keys, local)
        asyncio.get_running_loop().set_exception_handler(quietly)
        server = Server(
            uvicorn.Config(
                app,
                http=type("Connection", (Connection,), {"reading": limits.reading, "most": room()}),
                ws="none",
                backlog=1,
                log_config=None,
                lifespan="off",
                timeout_graceful_shutdown=math.ceil(limits.drain + LAST_WORDS),
                server_header=False,
            ),
            service,
            lambda: started(service),
        )
        watch = asyncio.create_task(_end_with(client, server))
        await server.serve([listener])
        watch.cancel()
        if client.failure is not None:
            raise client.failure
    finally:
        await client.close()


def _judge(
    folder: Path, tokenizer: PreTrainedTokenizerBase, template: Path | None, answers: tuple[str, str] | None
) -> Judge | PairTemplate | None:
    encoder = is_encoder(folder)
    if not encoder and not hub.read_config(folder).scalar_head:
        return open_judge(folder, tokenizer, template, answers)
    if answers is not None or (encoder and template is not None):
        raise UsageError(
            "the model gives no answers by which it could judge",
            hint="Leave out --rerank-answers, and --rerank-template for an encoder.",
        )
    if encoder:
        return None
    if template is None and not (tokenizer.chat_template and writes_pairs(tokenizer)):
        return None  # pairs as the tokenizer has them
    return open_template(folder, tokenizer, template)


async def _end_with(client: EngineClient | Replicas, server: uvicorn.Server) -> None:
    await client.dead.wait()
    await asyncio.sleep(LAST_WORDS)
    server.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket at ``host`` and ``port``; port 0 picks a free one.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_vanished_peers(listener)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"cannot listen at {host} port {port}: {error}", hint="Choose another --port.") from error
    return listener


def _notice_vanished_peers(listener: socket.socket) -> None:
    """Lets the system close connections whose other end is gone without a word; they inherit this of ``listener``."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tries = 4
    options = {
        "TCP_KEEPIDLE": VANISHED // 2,
        "TCP_KEEPINTVL": VANISHED // 2 // tries,
        "TCP_KEEPCNT": tries,
        "TCP_USER_TIMEOUT": VANISHED * 1000,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # what the system knows of them
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
