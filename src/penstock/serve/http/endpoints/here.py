"""What endpoints are given."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from penstock.serve.http.service import Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


#: The service of the application.
Here = Annotated[Service, Depends(_service)]
