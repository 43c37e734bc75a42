"""What codecs of the cache learn of a model: tables, from the keys and values that it computes of some text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from penstock.core.errors import PenstockError, UsageError
from penstock.core.files import cache_folder, explain_os_errors, read_text, write_atomic
from penstock.core.progress import Reporter, silent
from penstock.core.randomness import torch_generator
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models.attention import CachedRows
from penstock.models.decoder import Decoder
from penstock.ops.paged.codecs.contract import Codec, LearnedCodec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: Tokens of a piece of text, which the model reads from its beginning.
PIECE = 256


def learned_tables(
    model: Decoder, codec: Codec, pieces: Tensor | None = None, report: Reporter = silent
) -> Tensor | None:
    """The tables [layers, 2, K, ...] that ``codec`` learns of ``model`` ([layers, 1, 1, ...] where its attention is
    latent), on the model's device; None where it learns nothing.

    Tables of text are kept in the user's cache folder, under a name made of the codec and of all the keys and values.

    Args:
        pieces: int64 [P, T], tokens of text; None is random tokens.
    """
    if not isinstance(codec, LearnedCodec):
        return None
    file = None
    with report("learning the cache's codec", model.config.layers, "layer") as bar:
        samples = keys_and_values(model, _random_pieces(model, codec.tokens) if pieces is None else pieces)
        if pieces is not None:
            file = cache_folder("codecs") / f"{_digest(codec, samples)}.safetensors"
            found = _read(file)
            if found is not None:
                return found.to(model.like.device)
        learned = tables_of(codec, samples, bar.advance)
    if file is not None:
        _keep(file, learned)
    return learned


def tables_of(codec: LearnedCodec, samples: list[list[Tensor]], advance: Callable[[], object] = int) -> Tensor:
    """The tables [layers, 2, K, ...] that ``codec`` learns of ``samples``, as :func:`keys_and_values` gives them; after
    each layer it calls ``advance``."""
    tables = []
    for layer in samples:
        tables.append(torch.stack([codec.learn(vectors) for vectors in layer]))
        advance()
    return torch.stack(tables)


@torch.inference_mode()
def keys_and_values(model: Decoder, pieces: Tensor) -> list[list[Tensor]]:
    """Of each layer, the keys and the values (where attention is latent, the keys alone) that ``model`` computes of
    ``pieces`` int64 [P, T], as they would lie in its cache: float32 [P T, K, D] each."""
    device, parts = model.like.device, 1 if model.config.latent else 2
    found: list[list[list[Tensor]]] = [[[] for _ in range(parts)] for _ in range(model.config.layers)]
    for piece in pieces:
        rows = CachedRows().extend(len(piece), device)
        model(piece[None].to(device), rows)
        for layer, own in enumerate(found):
            for kept, vectors in zip(own, rows.kept(layer), strict=False):
                kept.append(vectors[0].float())
    return [[torch.cat(kept) for kept in layer] for layer in found]


def pieces_of_text(tokenizer: PreTrainedTokenizerBase, codec: Codec, context: int) -> Tensor | None:
    """The tokens that ``codec`` learns from, in pieces: int64 [P, T]; None where it learns nothing.

    Raises:
        UsageError: the text is too short, or cannot be read.
    """
    if not isinstance(codec, LearnedCodec):
        return None
    length, wanted = min(PIECE, context), -(-codec.tokens // min(PIECE, context))
    documents = (
        (document.text for document in StandardLibrary().documents()) if codec.text is None else _parts(codec.text)
    )
    pieces: list[Tensor] = []
    for text in documents:
        tokens = tokenizer(text[: 16 * length], add_special_tokens=False)["input_ids"][:length]
        if len(tokens) == length:
            pieces.append(torch.tensor(tokens))
        if len(pieces) == wanted:
            return torch.stack(pieces)
    raise UsageError(
        f"the text that the codec is to learn from has {len(pieces)} of {wanted} pieces of {length} tokens",
        hint="Name a larger file in engine.codec.text, or set engine.codec.tokens to less.",
    )


def _parts(file: Path) -> list[str]:
    """The text of ``file``, cut to about what a piece is taken from."""
    text = read_text(file)
    return [text[start : start + 16 * PIECE] for start in range(0, len(text), 8 * PIECE)]


def _random_pieces(model: Decoder, count: int) -> Tensor:
    length = min(PIECE, model.config.context)
    draw = torch_generator(0, "serve/calibration")
    return torch.randint(model.config.vocabulary, (-(-count // length), length), generator=draw)


def _digest(codec: LearnedCodec, samples: list[list[Tensor]]) -> str:
    learning = {name: value for name, value in codec.describe().items() if name != "residual"}
    identity = hashlib.blake2b(json.dumps(learning, sort_keys=True).encode(), digest_size=16)
    for layer in samples:
        for vectors in layer:
            identity.update(vectors.cpu().numpy().tobytes())
    return identity.hexdigest()


def _read(file: Path) -> Tensor | None:
    """The tables in ``file``; None where it is not there, or damaged."""
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        tables: Tensor = load(file.read_bytes())["tables"]
        return tables
    return None


def _keep(file: Path, tables: Tensor) -> None:
    try:
        with explain_os_errors(f"cannot keep {file.name}"):
            write_atomic(file, save({"tables": tables.cpu().contiguous()}))
    except PenstockError as error:
        log.warning("what the codec learned is learned again at the next start: %s", error.what)
