"""What operators ask for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from penstock.serve.http.protocol.body import LARGEST, Body


class Weights(Body):
    """``POST /weights``: other weights for the model, of a folder on the server's machine."""

    folder: Annotated[str, Field(min_length=1, max_length=4096)]
    #: What they are called from now on; one more than before if not given.
    version: Annotated[int, Field(ge=0, le=LARGEST)] | None = None


class Adapter(Body):
    """``POST /adapters``: an adapter of a folder on the server's machine, and what requests call it."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    folder: Annotated[str, Field(min_length=1, max_length=4096)]
