"""Lines of a batch file that ask for vectors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.progress import silent
from penstock.models.encoders.pooling import cuts_of
from penstock.serve.engine.engine import Engine
from penstock.serve.http.protocol.vectors import Embeddings
from penstock.serve.http.text import Tokens
from penstock.serve.http.vectors import shortened, usage, written
from penstock.serve.link.wire import VectorForm
from penstock.serve.offline.embedders import embedder_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
