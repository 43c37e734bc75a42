"""What clients do to a connection, beside a server of one small application."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging

import pytest
import uvicorn

from penstock.serve.http import connection
from penstock.serve.http.connection import Connection, quietly, room

#: Seconds that are long enough for what must not happen, and for what must.
LONG = 30.0


async def app(scope, receive, send):
    """Says how long the body is."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def served(reading: float = LONG, most: int = 100):
    """Opens connections to a server."""
    kind = type("Limited", (Connection,), {"reading": reading, "most": most})
    server = uvicorn.Server(uvicorn.Config(app, http=kind, ws="none", lifespan="off", log_config=None, port=0))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield lambda: asyncio.open_connection("127.0.0.1", port)
    finally:
        server.should_exit = True
        await task


def said(answer: bytes) -> tuple[int, str]:
    """The status and message of an error, which must have OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["message"]


def answer_to(*parts: bytes, **limits) -> bytes:
    """All that a server says to ``parts`` until it closes the connection."""

    async def talk():
        async with served(**limits) as connect:
            reader, writer = await connect()
            for part in parts:
                writer.write(part)
                await writer.drain()
            found = await asyncio.wait_for(reader.read(), LONG)
            writer.close()
            return found

    return asyncio.run(talk())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\0" * 100 + b"\r\n\r\n", 400),
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nGARBAGE\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 10**5, 431),
    ],
    ids=range(8),
)
def test_what_is_no_http_is_told_in_openai_s_shape(sent, status):
    found, message = said(answer_to(sent))
    assert found == status
    assert message.startswith("this is not a request in HTTP/1.1: ")
    assert "bytearray" not in message
    assert len(message) < 300


@pytest.mark.parametrize("sent", [b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"])
def test_a_request_that_stops_halfway_is_dropped_after_a_time(sent):
    assert said(answer_to(sent, reading=0.2)) == (408, "the request did not come to its end within 0.2 seconds")


def test_a_client_that_says_nothing_is_dropped_after_a_time():
    assert answer_to(reading=0.2) == b""


def test_a_body_that_comes_slowly_is_waited_for():
    """Its time counts for each part of it."""

    async def talk():
        async with served(reading=1.0) as connect:
            reader, writer = await connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 12\r\n\r\n")
            for _ in range(12):
                await asyncio.sleep(0.1)
                writer.write(b"x")
            found = await asyncio.wait_for(reader.read(), LONG)
            writer.close()
            return found

    assert asyncio.run(talk()).endswith(b"\r\n\r\n12")


def test_another_protocol_is_not_taken_and_the_request_is_answered(caplog):
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close, upgrade\r\nUpgrade: websocket\r\n\r\n"
    with caplog.at_level(logging.WARNING):
        assert answer_to(request).endswith(b"\r\n\r\n0")
    assert caplog.text == ""


def test_connections_for_which_there_is_no_room_are_refused_with_few_words(caplog):
    async def talk():
        async with served(most=2) as connect:
            kept = [await connect() for _ in range(2)]
            refused = []
            for _ in range(50):
                reader, writer = await connect()
                refused.append(await asyncio.wait_for(reader.read(), LONG))
                writer.close()
            for _, writer in kept:
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answers = [await asyncio.wait_for(reader.read(), LONG) for reader, _ in kept]
            for _, writer in kept:
                writer.close()
            return refused, answers

    refused, answers = asyncio.run(talk())
    assert {said(answer)[0] for answer in refused} == {503}
    assert all(answer.endswith(b"\r\n\r\n0") for answer in answers)
    assert 1 <= caplog.text.count("2 connections are open") < 10


def test_room_is_within_the_limit_of_open_files():
    resource = pytest.importorskip("resource")
    most = room()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard
    assert 1 <= most < hard or hard == resource.RLIM_INFINITY


def test_running_out_of_descriptors_is_said_once_a_second(monkeypatch, caplog):
    monkeypatch.setattr(connection, "crowded", connection.Seldom(logging.getLogger("test")))
    now = 100.0
    monkeypatch.setattr(connection.time, "monotonic", lambda: now)
    full = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "Too many")}
    loop = asyncio.new_event_loop()
    try:
        for step in range(3000):
            now = 100.0 + step / 1000
            quietly(loop, full)
        assert [record.message.count("have to wait") for record in caplog.records] == [1, 1, 1]
        assert "999 times more" in caplog.records[-1].message
        # Anything else is as it was.
        quietly(loop, {"message": "another", "exception": OSError(errno.EPIPE, "x")})
        assert caplog.records[-1].name == "asyncio"
    finally:
        loop.close()
