"""How messages travel between a front end and the process of its engine: MessagePack in the frames of a channel.

A message is a pair: the name of its class, and its fields.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np

from penstock.core.events import Event
from penstock.serve.choose.logprobs import LogprobRows
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.messages import Abort, Control, Delta, Embed, Request, Snapshot, Vectors

#: Of arrays.
WORD = np.dtype("<i4")


@dataclasses.dataclass(frozen=True)
class Open:
    """The first message to an engine's process: what to load (``config`` is an EngineConfig as JSON)."""

    model: str
    config: str
    device: str


@dataclasses.dataclass(frozen=True)
class VectorForm:
    """What vectors a model makes: of ``size`` numbers, of which the first so many as are in ``cuts`` are vectors too,
    with the length 1 where they are ``normalized``. A model of ``pairs`` makes one number of a pair of texts instead,
    the logit of a score where there is a ``sigmoid``."""

    size: int
    normalized: bool
    cuts: list[int]
    pairs: bool = False
    sigmoid: bool = False


@dataclasses.dataclass(frozen=True)
class Ready:
    """The engine stands: ``context`` is the most tokens of a sequence, ``sequences`` the most that run at a time, and
    ``memory`` has bytes of each rank's device by what they are for, and ``codec`` is the cache's. ``vectors`` is None
    where it makes none, and one that does not write is an encoder's, or has a scalar head."""

    context: int
    sequences: int
    vocabulary: int
    memory: list[dict[str, int]]
    codec: str
    vectors: VectorForm | None = None
    writes: bool = True


@dataclasses.dataclass(frozen=True)
class Failed:
    """The engine could not be opened, or ends: a PenstockError in parts."""

    what: str
    hint: str
    exit_code: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """A request that the engine does not take; with ``defect`` that is the engine's fault."""

    id: str
    what: str
    defect: bool = False


@dataclasses.dataclass(frozen=True)
class Errand:
    """Work that takes many requests, for which somebody lives in the engine's process: the ``guest`` that a module has
    of that name, such as ``penstock.search.guest``. He reads ``work``, JSON, beside the ``request`` that it is about,
    and answers with :class:`Done`, or it is refused."""

    request: Request
    guest: str
    work: str


@dataclasses.dataclass(frozen=True)
class Done:
    """What came of the errand with the request ``id``, as JSON; of what an operator wanted, that it is done."""

    id: str
    result: str = ""


@dataclasses.dataclass(frozen=True)
class News:
    """What one step made known, every now and then the engine's state after it, and what was decided about requests
    since the last news."""

    deltas: list[Delta]
    snapshot: Snapshot | None = None
    events: list[Event] = dataclasses.field(default_factory=list)


Message = Open | Ready | Failed | Request | Embed | Abort | Control | Errand | Done | Refused | News | Vectors


def _plain(value: Any) -> Any:
    if isinstance(value, LogprobRows):
        return value.table.shape[1], value.table.astype(WORD, copy=False).tobytes()
    if isinstance(value, SamplingParams):
        return value.model_dump(mode="json", exclude_defaults=True)
    raise NotImplementedError(f"{type(value).__name__} cannot travel between processes")


def _made(kind: type[Any], value: Any) -> Any:
    if kind is LogprobRows:
        columns, rows = value
        return LogprobRows(np.frombuffer(rows, WORD).reshape(-1, columns))
    return kind.model_validate(value)


KINDS: dict[str, Any] = {
    kind.__name__: msgspec.msgpack.Decoder(kind, dec_hook=_made)
    for kind in (Open, Ready, Failed, Request, Embed, Abort, Control, Errand, Done, Refused, News, Vectors)
}
_envelope = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])

_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)


def body(message: Message) -> bytes:
    """The bytes of ``message``."""
    return _encoder.encode((type(message).__name__, message))


def parse(body: bytes) -> Message:
    """The message of :func:`body`."""
    kind, fields = _envelope.decode(body)
    message: Message = KINDS[kind].decode(fields)
    return message
