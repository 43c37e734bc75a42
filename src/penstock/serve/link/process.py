"""The engine in a process of its own.

The process that starts it keeps the other end of a socket pair, and nobody else can have it. When that end closes,
for whatever reason, this process ends after the step that it is in, and after some seconds whatever it does: no engine
outlives its front end.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from penstock.core.channel import Channel
from penstock.core.devices import pick
from penstock.core.errors import PenstockError, UsageError
from penstock.core.garbage import settle
from penstock.core.progress import show
from penstock.models import hub
from penstock.models.encoders.folder import is_classifier, is_encoder
from penstock.models.encoders.pooling import cuts_of, pooling_of
from penstock.models.formats.weight_file import LostWeightsError
from penstock.serve.config import EngineConfig
from penstock.serve.embed.encoder_engine import EncoderEngine
from penstock.serve.embed.paired import PairModel, paired_decoder, paired_encoder
from penstock.serve.embed.pooled import LAST, PooledModel, pooled_decoder, pooled_encoder
from penstock.serve.embed.waiting import WaitingTexts
from penstock.serve.link.host import Host
from penstock.serve.link.wire import Done, Errand, Failed, Message, News, Open, Ready, Refused, VectorForm, body, parse
from penstock.serve.messages import Abort, Control, Embed, Request
from penstock.serve.opening import dtype_of, open_engine
from penstock.serve.ranks.group import RankLostError, Ranks
from penstock.serve.ranks.runner import ALONE, LeadingRunner, RankRunner
from penstock.serve.run.runner import Runner

log = logging.getLogger(__name__)

#: What models are called that write nothing.
NO_WRITER = "a model that makes vectors or numbers"

#: Seconds between two snapshots of a busy engine.
SNAPSHOTS = 0.1


def serve(host: Host, channel: Channel[Message]) -> None:
    """Steps the engine while it has anything to do, and takes messages in between, until the other end closes."""
    engine, told = host.engine, 0.0
    while True:
        for message in channel.pending(not host.busy, host.due):
            if message is None:
                engine.close()
                return
            _take(host, message, channel)
        deltas, done = host.step()
        now = time.monotonic()
        snapshot = None
        if now - told >= SNAPSHOTS or not host.busy:
            snapshot, told = host.snapshot(), now
        if deltas or snapshot is not None:
            channel.send(News(deltas, snapshot, engine.events.fresh()))
        for each in done:
            channel.send(each)


def _take(host: Host, message: Message, channel: Channel[Message]) -> None:
    assert isinstance(message, Request | Errand | Embed | Control | Abort)
    id = message.request.id if isinstance(message, Errand) else message.id
    try:
        host.take(message)
    except PenstockError as error:
        channel.send(Refused(id, str(error)))
    except Exception as error:  # nobody foresaw it; other requests go on
        log.exception("the request %s cannot be taken in", id)
        host.engine.abort(id)
        channel.send(Refused(id, f"{type(error).__name__}: {error}", defect=True))
    else:
        if isinstance(message, Control):
            channel.send(News([], host.snapshot()))
            channel.send(Done(id))


def opened(wanted: Open, channel: Channel[Message]) -> tuple[Host, Ready]:
    """The model that is ``wanted``, at work, and what is told of it; ``channel`` is told if a rank is lost.

    Raises:
        PenstockError: it cannot be had, or does not fit.
    """
    config, folder = EngineConfig.model_validate_json(wanted.config), hub.resolve(wanted.model)
    encoder = is_encoder(folder)
    if encoder or hub.read_config(folder).scalar_head:
        if config.ranks > 1:
            raise UsageError(f"{NO_WRITER} is not divided among ranks", hint=ALONE)
        if config.resident_weights is not None:
            raise UsageError(f"{NO_WRITER} has all of its weights in memory", hint="Leave out resident_weights.")
        if config.room_for_adapters:
            raise UsageError(f"{NO_WRITER} is served without adapters", hint="Leave out adapters and adapter_slots.")
        device = pick(wanted.device)
        dtype = dtype_of(config, device)
        model: PooledModel | PairModel
        if not encoder or is_classifier(folder):
            model = (paired_encoder if encoder else paired_decoder)(folder, device, dtype)
            form = VectorForm(model.size, False, [], pairs=True, sigmoid=model.sigmoid)
        else:
            model = pooled_encoder(folder, device, dtype, None)
            form = _form(model, folder)
        memory = [{"weights": model.weights}]
        ready = Ready(model.context, config.sequences, model.vocabulary, memory, "none", form, writes=False)
        return Host(EncoderEngine(), wanted.model, WaitingTexts(model, config.budget(device))), ready
    engine = open_engine(wanted.model, config, wanted.device, show)
    limits, executor, codec = engine.limits, engine.executor, config.codec.policy_name
    memory = [dict(executor.memory)]
    if isinstance(executor, LeadingRunner) and executor.ranks is not None:
        memory += executor.ranks.memory
        executor.ranks.watch(functools.partial(_end, channel=channel, ranks=executor.ranks))
    texts, ready = None, Ready(engine.limits.context, limits.sequences, limits.model.vocabulary, memory, codec)
    if isinstance(executor, Runner) and not isinstance(executor, RankRunner):
        pooled = pooled_decoder(executor.model, pooling_of(folder, LAST))
        texts = WaitingTexts(pooled, config.budget(executor.device))
        ready = dataclasses.replace(ready, vectors=_form(pooled, folder))
    return Host(engine, wanted.model, texts), ready


def _form(model: PooledModel, folder: Path) -> VectorForm:
    return VectorForm(model.size, model.pooling.normalize, list(cuts_of(folder, model.size)))


def main() -> None:
    """What the process runs: its argument is the file descriptor of its end of the socket pair."""
    # Ctrl-C and SIGTERM reach the whole group; the front end decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), body, parse)
    wanted = channel.receive()
    if wanted is None:
        return
    assert isinstance(wanted, Open)
    channel.listen()
    try:
        host, ready = opened(wanted, channel)
    except PenstockError as error:
        channel.send(Failed(error.what, error.hint, error.exit_code))
        return
    settle()
    channel.send(ready)
    channel.send(News([], host.snapshot()))
    try:
        serve(host, channel)
    except (RankLostError, LostWeightsError) as error:
        _end(error, channel)


def _end(error: PenstockError, channel: Channel[Message], ranks: Ranks | None = None) -> None:
    """Says why the engine ends, and ends this process, from whichever thread: another may wait for a lost rank. The
    other ``ranks`` end before it."""
    channel.send(Failed(error.what, error.hint, error.exit_code))
    if ranks is not None:
        ranks.bury()
    os._exit(error.exit_code)
