"""Texts that wait for their vectors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from penstock.core.errors import UsageError
from penstock.serve.embed.paired import PairModel
from penstock.serve.embed.pooled import PooledModel
from penstock.serve.messages import Embed, Vectors


class WaitingTexts:
    """The texts of several requests, which are computed together: each request in turn gives one, until a pass has as
    many tokens as it may, so that a small request does not wait for a large one.

    Args:
        model: makes the vectors, or the numbers of pairs.
        tokens: most of a pass, but for a text that has more alone.

    Attributes:
        texts, tokens: how many were computed so far.
    """

    def __init__(self, model: PooledModel | PairModel, tokens: int) -> None:
        self.model, self._most = model, tokens
        self._requests: deque[tuple[str, deque[tuple[int, Sequence[int], int | None]]]] = deque()
        self.texts = self.tokens = 0

    @property
    def busy(self) -> bool:
        """Whether any text waits."""
        return bool(self._requests)

    def add(self, request: Embed) -> None:
        """Takes in a request.

        Raises:
            UsageError: a text is empty, too long or has unknown tokens, or the model reads pairs and it is none.
        """
        if isinstance(self.model, PairModel) != (request.seconds is not None):
            raise UsageError("a model of pairs compares texts, and makes no vectors of them; others do the opposite")
        for text in request.texts:
            if not 0 < len(text) <= self.model.context:
                raise UsageError(f"a text has {len(text)} tokens, and the model reads 1 to {self.model.context}")
            if not 0 <= min(text) <= max(text) < self.model.vocabulary:
                raise UsageError(f"a text has a token outside of the vocabulary of {self.model.vocabulary}")
        if request.texts:
            seconds: Sequence[int | None] = request.seconds or [None] * len(request.texts)
            numbers = range(len(request.texts))
            self._requests.append((request.id, deque(zip(numbers, request.texts, seconds, strict=True))))

    def abort(self, id: str) -> None:
        """The vectors of the request ``id`` are not wanted any more; an unknown one is ignored."""
        self._requests = deque(each for each in self._requests if each[0] != id)

    def step(self) -> list[Vectors]:
        """Computes a pass; the vectors of its texts, by request."""
        taken: list[tuple[str, int, Sequence[int], int | None]] = []
        room = self._most
        while self._requests:
            id, texts = self._requests[0]
            if taken and len(texts[0][1]) > room:
                break
            place, text, second = texts.popleft()
            taken.append((id, place, text, second))
            room -= len(text)
            if texts:
                self._requests.rotate(-1)
            else:
                self._requests.popleft()
        if not taken:
            return []
        # Those of one length are neighbours, and computed as rows of one product.
        taken.sort(key=lambda each: len(each[2]))
        several = [text for _, _, text, _ in taken]
        if isinstance(self.model, PairModel):
            rows = self.model(several, [second for *_, second in taken if second is not None]).numpy()
        else:
            rows = self.model(several).numpy()
        self.texts += len(taken)
        self.tokens += self._most - room
        of: dict[str, list[int]] = {}
        for row, (id, *_) in enumerate(taken):
            of.setdefault(id, []).append(row)
        return [Vectors(id, [taken[row][1] for row in own], rows[own].tobytes()) for id, own in of.items()]
