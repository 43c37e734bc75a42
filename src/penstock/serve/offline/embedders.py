"""What makes vectors by the model of an engine in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import UsageError
from penstock.models.encoders.pooling import Pooling, pooling_of
from penstock.serve.embed.embedder import Embedder
from penstock.serve.embed.pooled import LAST, pooled_decoder
from penstock.serve.engine.engine import Engine
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
