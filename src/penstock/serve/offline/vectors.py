"""Vectors of texts, from an engine in this process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import UsageError
from penstock.core.progress import silent
from penstock.models.encoders.pooling import Pooling, cuts_of, pooling_of
from penstock.serve.embed.embedder import Embedder
from penstock.serve.embed.pooled import LAST, pooled_decoder
from penstock.serve.engine.engine import Engine
from penstock.serve.http.protocol.vectors import Embeddings
from penstock.serve.http.text import Tokens
from penstock.serve.http.vectors import shortened, usage, written
from penstock.serve.link.wire import VectorForm
from penstock.serve.ranks.runner import ALONE, RankRunner
from penstock.serve.run.runner import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def embedder_of(
    engine: Engine, folder: Path, tokenizer: PreTrainedTokenizerBase, pooling: Pooling | None = None
) -> Embedder:
    """Makes vectors by the model of ``engine``, which is that of ``folder``.

    Raises:
        UsageError: it is not there as a whole.
    """
    if engine.control.asleep:
        raise UsageError("the engine is asleep", hint="Call wake() before it is to make vectors.")
    if not isinstance(engine.executor, Runner):
        raise UsageError("an engine that records its steps makes no vectors", hint="Leave out `record`.")
    if isinstance(engine.executor, RankRunner):
        raise UsageError("a model that is divided among ranks makes no vectors", hint=ALONE)
    return Embedder(pooled_decoder(engine.executor.model, pooling or pooling_of(folder, LAST)), tokenizer)


class LineVectors:
    """Answers lines of a batch file that ask for vectors.

    Args:
        engine: whose model makes them.
        folder: of the model.
        tokens, tokenizer: its tokenizer.
    """

    def __init__(self, engine: Engine, folder: Path, tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> None:
        self._engine, self._folder, self._tokens, self._tokenizer = engine, folder, tokens, tokenizer

    def answer(self, place: int, model: str, body: Embeddings) -> dict[str, Any]:
        """The body of the response to ``body``, the line ``place``; ``model`` is what it is called.

        Raises:
            UsageError: a text is empty or too long.
            ApiError: its vectors cannot be so short.
        """
        embedder = embedder_of(self._engine, self._folder, self._tokenizer)
        size, context = embedder.model.size, embedder.model.context
        form = VectorForm(size, embedder.model.pooling.normalize, list(cuts_of(self._folder, size)))
        asked = body.truncate_prompt_tokens
        most = asked if asked is None or 0 < asked < context else context
        texts = [
            self._tokens.encode_first(text, most, body.add_special_tokens) if isinstance(text, str) else text[:most]
            for text in body.texts()
        ]
        vectors = shortened(embedder.embed(texts, progress=silent).numpy(), body.dimensions, form)
        return {
            "id": f"embd-{place}",
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "data": [
                {"object": "embedding", "index": number, "embedding": written(vector, body.encoding_format)}
                for number, vector in enumerate(vectors)
            ],
            "usage": usage(sum(map(len, texts))),
        }
