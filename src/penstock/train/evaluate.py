"""Held-out loss in bits per byte, a measure that does not depend on the tokenizer."""

from __future__ import annotations

import dataclasses
import lzma
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from penstock.core.devices import synchronize
from penstock.core.progress import Reporter, silent
from penstock.core.randomness import numpy_generator
from penstock.data.store import Split
from penstock.models.acceptance.head import Pair
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.heads.headed import Headed
from penstock.ops.cross_entropy import IGNORE, linear_cross_entropy
from penstock.train.objectives.acceptance import Acceptance


class Documents(Protocol):
    """What is evaluated: documents as token ids, each ending with the end-of-text token.

    :class:`~penstock.data.store.Split` tells what the attributes count.
    """

    @property
    def documents(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def prefix(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    def document(self, index: int) -> NDArray[np.integer]: ...


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some documents of a split, by their ``numbers`` there; counts are those of :class:`Documents`."""

    split: Split
    numbers: Sequence[int]

    @property
    def documents(self) -> int:
        return len(self.numbers)

    @property
    def prefix(self) -> int:
        return self.split.prefix

    @property
    def tokens(self) -> int:
        return sum(self.split.length(number) for number in self.numbers)

    @property
    def bytes(self) -> int:
        return sum(self.split.document_bytes(number) for number in self.numbers)

    def document(self, index: int) -> NDArray[np.integer]:
        return self.split.document(self.numbers[index])


@torch.no_grad()
def affordable(
    model: Decoder,
    split: Split,
    *,
    window: int,
    rows: int = 8,
    seconds: float,
    agreed: Callable[[float], float] = lambda took: took,
) -> Sample:
    """As many documents of ``split`` as :func:`bits_per_byte` can do in about ``seconds``: all, or a random choice.

    One batch is timed for it, of which it took what is ``agreed``; one document, the shortest, is always there.
    """
    device = model.like.device
    tokens, context = torch.zeros(rows, window, dtype=torch.int64, device=device), CausalRows.of(window, device)
    took = math.inf
    for _ in range(2):  # the first one warms up
        synchronize(device)
        began = time.monotonic()
        hidden = model(tokens, context).hidden
        linear_cross_entropy(
            hidden.flatten(0, 1), model.head.weight, tokens.flatten(), cap=model.config.logits_cap
        ).item()
        took = min(took, time.monotonic() - began)
    room = seconds / agreed(took) * rows
    chosen = []
    for number in numpy_generator(0, "evaluate/sample").permutation(split.documents).tolist():
        cost = max(1, math.ceil((split.length(number) - 1) / max(1, window // 2)))
        if cost <= room:
            room -= cost
            chosen.append(number)
    shortest = min(range(split.documents), key=split.document_bytes)
    return Sample(split, sorted(chosen) or [shortest])


@torch.no_grad()
def bits_per_byte(
    model: Decoder, documents: Documents, *, window: int, rows: int = 8, report: Reporter = silent
) -> float:
    """Bits that ``model`` needs for each UTF-8 byte of ``documents``, every document on its own.

    All tokens of a document are predicted, the end-of-text token after it too. What begins every document (BOS) is no
    part of it, and costs nothing; where nothing does, the first token is charged log2(vocabulary) bits. Windows of
    ``window`` tokens advance by half their length, and each token is predicted once, so all but a document's first
    tokens see at least half a window before them.

    Args:
        model: the model.
        documents: at least one.
        window: tokens that the model sees at a time.
        rows: windows at a time.
        report: shows the progress.
    """
    device = model.like.device
    context = CausalRows.of(window, device)
    nats = 0.0 if documents.prefix else documents.documents * math.log(model.config.vocabulary)
    with report("evaluating", documents.tokens, "tok") as bar:
        bar.advance(documents.documents * max(1, documents.prefix))
        for tokens, targets in _batches(documents, window, rows):
            hidden = model(torch.from_numpy(tokens).to(device), context).hidden
            wanted = torch.from_numpy(targets).to(device).flatten()
            nats += linear_cross_entropy(
                hidden.flatten(0, 1), model.head.weight, wanted, cap=model.config.logits_cap
            ).item()
            bar.advance(int((targets != IGNORE).sum()))
    return nats / math.log(2) / documents.bytes


@torch.no_grad()
def agreement(
    model: Headed, documents: Documents, *, window: int, rows: int = 8, report: Reporter = silent
) -> list[float]:
    """How often the likeliest token of each guess of a head is the target's, by how far ahead it is: a share of the
    places in ``documents`` that have one so far ahead. Windows are those of :func:`bits_per_byte`.
    """
    device, target = model.target.like.device, model.target
    context = CausalRows.of(window, device)
    right: dict[int, float] = {}
    places: dict[int, int] = {}
    with report("evaluating", documents.tokens, "tok") as bar:
        bar.advance(documents.documents * max(1, documents.prefix))
        for tokens, targets in _batches(documents, window, rows):
            rows_here = torch.from_numpy(tokens).to(device)
            hidden = target(rows_here, context).hidden
            said, counts = target.logits(hidden).argmax(-1), torch.from_numpy(targets != IGNORE).to(device)
            for guess in model.head.guesses(target, hidden, rows_here, context):
                ahead, last = guess.ahead, window - guess.ahead
                same = target.logits(guess.hidden[:, :last]).argmax(-1) == said[:, ahead:]
                counted = counts[:, ahead:] & counts[:, :last]
                right[ahead] = right.get(ahead, 0.0) + float((same & counted).sum())
                places[ahead] = places.get(ahead, 0) + int(counted.sum())
            bar.advance(int(counts.sum()))
    return [right[ahead] / max(1, places[ahead]) for ahead in sorted(right)]


@torch.no_grad()
def predicted_acceptance(
    pair: Pair,
    objective: Acceptance,
    documents: Documents,
    *,
    window: int,
    rows: int = 8,
    report: Reporter = silent,
) -> dict[str, float]:
    """What the target of a ``pair`` accepts of drafted tokens in ``documents``, and what its head says of it. Windows
    are those of :func:`bits_per_byte`.

    Returns:
        ``accepted``, the share of drafted tokens that is; ``predicted``, the mean prediction; ``cross_entropy``, that
        of the predictions in nats a token; and ``constant``, what it would be had the share been predicted everywhere.
    """
    device, context = pair.target.like.device, CausalRows.of(window, pair.target.like.device)
    sums = torch.zeros(3, dtype=torch.float64)
    places = 0
    with report("evaluating", documents.tokens, "tok") as bar:
        bar.advance(documents.documents * max(1, documents.prefix))
        for tokens, targets in _batches(documents, window, rows):
            here, counts = torch.from_numpy(tokens).to(device), torch.from_numpy(targets != IGNORE).to(device)
            drafted, said = (model(here, context).hidden[counts] for model in (pair.draft, pair.target))
            for piece in zip(torch.split(drafted, objective.chunk), torch.split(said, objective.chunk), strict=True):
                share, accepted, logits = objective.predicted(pair, *piece)
                each = -(accepted * F.logsigmoid(logits) + (1 - accepted) * F.logsigmoid(-logits))
                sums += torch.stack([(share * one).sum() for one in (accepted, logits.sigmoid(), each)]).double().cpu()
            places += int(counts.sum())
            bar.advance(int(counts.sum()))
    accepted_share, predicted, entropy = (sums / max(1, places)).tolist()
    return {
        "accepted": accepted_share,
        "predicted": predicted,
        "cross_entropy": entropy,
        "constant": sum(-math.log(each) * each for each in (accepted_share, 1 - accepted_share) if each > 0),
    }


def _windows(
    document: NDArray[np.integer], window: int, prefix: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(tokens, targets), each [window]; targets in the prefix, or that an earlier window predicted, are ignored."""
    last = len(document) - 1
    done, start = 0, 0
    while done < last:
        end = min(start + window, last)
        tokens, targets = np.zeros(window, np.int64), np.full(window, IGNORE, np.int64)
        tokens[: end - start] = document[start:end]
        targets[done - start : end - start] = document[done + 1 : end + 1]
        targets[: max(0, prefix - 1 - start)] = IGNORE
        yield tokens, targets
        done, start = end, start + max(1, window // 2)


def _batches(documents: Documents, window: int, rows: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    empty = np.zeros(window, np.int64), np.full(window, IGNORE, np.int64)
    for index in range(documents.documents):
        for pair in _windows(documents.document(index), window, documents.prefix):
            waiting.append(pair)
            if len(waiting) == rows:
                yield np.stack([t for t, _ in waiting]), np.stack([y for _, y in waiting])
                waiting = []
    if waiting:
        waiting += [empty] * (rows - len(waiting))
        yield np.stack([t for t, _ in waiting]), np.stack([y for _, y in waiting])


def xz_bits_per_byte(texts: list[bytes]) -> float:
    """Bits for each byte that ``xz -9`` needs for the same documents, each compressed on its own."""
    compressed = sum(len(lzma.compress(text, preset=9)) for text in texts)
    return 8 * compressed / sum(len(text) for text in texts)
