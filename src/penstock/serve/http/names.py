"""Names of requests, by which clients and proxies find them again in their logs."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: The header, of requests and responses.
NAME = "x-request-id"

#: What a client may call a request; anything else is not repeated.
SAFE = re.compile("[!-~]{1,128}")


class RequestNames:
    """Gives every response of ``app``, an error's too, the name that its request came with, or one of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(NAME, "") if scope["type"] == "http" else ""
        name = given if SAFE.fullmatch(given) else f"req-{uuid.uuid4().hex}"

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(NAME, name)
            await send(message)

        await self._app(scope, receive, named)
