"""What ranks say to each other beside what they exchange in steps: MessagePack in the frames of a channel."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec


@dataclasses.dataclass(frozen=True)
class Follow:
    """The first message to a rank: which it is among how many, what all of them load (``config`` is an EngineConfig as
    JSON), and the port of the store in which they meet."""

    rank: int
    size: int
    model: str
    config: str
    device: str
    port: int


@dataclasses.dataclass(frozen=True)
class Do:
    """What the first rank does, and the others are to do too: a method of theirs, and its arguments."""

    what: str
    arguments: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Done:
    """The answer to a :class:`Follow`, once the share is loaded, and to what else waits for one: ``memory`` has bytes
    of the rank's device by what they are for, and ``key`` is that of the adapter that was loaded."""

    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    key: bytes = b""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A rank cannot be opened, or cannot load an adapter: a PenstockError in parts."""

    what: str
    hint: str
    exit_code: int


Message = Follow | Do | Done | Refusal

_decoders: dict[str, Any] = {kind.__name__: msgspec.msgpack.Decoder(kind) for kind in (Follow, Do, Done, Refusal)}
_envelope = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_encoder = msgspec.msgpack.Encoder()


def body(message: Message) -> bytes:
    """The bytes of ``message``."""
    return _encoder.encode((type(message).__name__, message))


def parse(body: bytes) -> Message:
    """The message of :func:`body`."""
    kind, fields = _envelope.decode(body)
    message: Message = _decoders[kind].decode(fields)
    return message
