"""How a request's tokens are chosen."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from penstock.models.sampling import Sampling

#: The largest number of continuations of one request.
MOST = 128


class SamplingParams(Sampling):
    """:class:`~penstock.models.sampling.Sampling` with what a server's users ask for besides.

    Attributes:
        n: how many continuations, drawn with the seeds ``seed``, ``seed`` + 1, ...
        stop_tokens: tokens that end the text, besides the model's own.
        ignore_eos: the model's own end-of-text does not end it.
    """

    n: Annotated[int, Field(ge=1, le=MOST)] = 1
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
