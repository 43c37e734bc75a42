"""The text of one prompt's continuation, as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.reader import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def streamed(engine: Engine, tokenizer: PreTrainedTokenizerBase, request: Request) -> Iterator[str]:
    """What follows the prompt of ``request``, which has one continuation and is the only one in ``engine``, in pieces
    of whole characters. It is taken in at once, and computed as it is read.

    Raises:
        UsageError: the engine does not take it.
    """
    reader = Reader(request, tokenizer.backend_tokenizer)
    engine.add(request)

    def pieces() -> Iterator[str]:
        while engine.busy:
            for delta in engine.step():
                reading = reader.read(delta)
                if reading.early:
                    engine.abort(request.id)
                yield reading.text

    return filter(None, pieces())
