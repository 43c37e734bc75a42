"""Who may ask, and how much: keys and body limits, checked before a byte of a body is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.serve.http.errors import ApiError, response

#: What everybody may see: the page (which holds no data) and whether the server is well.
OPEN = frozenset({"/", "/health"})


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Lets requests through to ``app`` that bear a known key, and stops bodies that are too large.

    The key's digest goes along in the scope's state as ``key``: the engine shares itself fairly among keys.

    Args:
        keys: those that are known; with none, everybody may ask.
        local: a browser's requests must name this machine itself as their host, so that a page from elsewhere whose
            name resolves to this machine cannot use the server (DNS rebinding).
        body: most bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, *, keys: Collection[str], local: bool, body: int) -> None:
        self._app, self._local, self._body = app, local, body
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            scope.setdefault("state", {})["key"] = self._key(scope["path"], headers)
            declared = headers.get("content-length", "0")
            if not declared.isdigit() or int(declared) > self._body:
                raise self._too_large()
        except ApiError as error:
            return await response(error, scope["path"])(scope, receive, send)
        return await self._app(scope, self._limited(receive), send)

    def _key(self, path: str, headers: Headers) -> str:
        if self._local and not is_loopback(_host(headers.get("host", "localhost"))):
            raise ApiError(403, "this server answers to the names of this machine alone: use localhost")
        if not self._keys or path in OPEN:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if "x-api-key" in headers:  # as Anthropic's clients send it
            scheme, given = "bearer", headers["x-api-key"]
        # Every key is compared, each in constant time: how long it takes says nothing about any of them.
        token = given.strip().encode("latin-1")
        matches = [hmac.compare_digest(token, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "no valid API key: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return hashlib.sha256(token).hexdigest()[:16]

    def _limited(self, receive: Receive) -> Receive:
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._body:
                raise HTTPException(413, str(self._too_large()))
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._body} bytes")


def _host(header: str) -> str:
    """The host of a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
