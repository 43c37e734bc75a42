"""The continuations of a request that are computed in one row: which they are, and what stands for all of them."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.decode.contract import Judge
from penstock.serve.kv.pool import numbers_of


@dataclasses.dataclass(frozen=True)
class SuperposedText:
    """One of the texts.

    Attributes:
        tokens: that were generated.
        score: the log of its probability, by which texts are compared.
        logprobs: what the model said of each token, and beside it, in the row of all texts.
        ended: whether a token has ended it.
    """

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    ended: bool = False


class SuperposedTexts:
    """The texts of one request.

    Args:
        most: how many there are.
        judge: what a token is worth behind a text.
        stop: tokens that end one.

    Attributes:
        texts: the best by their probabilities, in order; before the first pass, one without tokens.
        rows: of each pass that was crossed, the last tokens of the texts that go on, and the share that each has in the
            row of the next pass: tokens int64 [n], weights float64 [n].
    """

    def __init__(self, most: int, judge: Judge, stop: frozenset[int]) -> None:
        self._most, self._judge, self._stop = most, judge, stop
        self.texts = [SuperposedText()]
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []

    def cross(self, told: TokenLogprobs) -> int:
        """Of all that the texts make with the tokens that are likeliest behind them, as ``told``, the best stay.

        Returns:
            A number that is no token, and stands for the row of the next pass: where the texts and their weights are
            the same, it is the same.
        """
        tokens, logprobs = zip(*told.top[: self._most], strict=True)
        crossed = [text for text in self.texts if text.ended]
        for text in self.texts:
            if not text.ended:
                worth = self._judge(text.tokens, tokens, logprobs)
                crossed += [self._longer(text, told, *each) for each in enumerate(worth)]
        self.texts = sorted(crossed, key=lambda text: -text.score)[: self._most]
        going = [text for text in self.texts if not text.ended]
        shares = np.exp(np.array([text.score - going[0].score for text in going]))
        last = np.array([text.tokens[-1] for text in going], np.int64)
        self.rows.append((last, shares / shares.sum()))
        name = b"".join(each.tobytes() for each in self.rows[-1])
        return numbers_of(hashlib.blake2b(name, digest_size=8).digest())[0]

    def _longer(self, text: SuperposedText, told: TokenLogprobs, place: int, worth: float) -> SuperposedText:
        token, logprob = told.top[place]
        known = TokenLogprobs(token, logprob, place + 1, told.top, told.entropy, told.certainty)
        return SuperposedText(
            (*text.tokens, token), text.score + worth, (*text.logprobs, known), ended=token in self._stop
        )

    @property
    def ranked(self) -> list[SuperposedText]:
        """The texts by the mean score of a token, the best first: one that has ended early is not the better for it."""
        return sorted(self.texts, key=lambda text: -text.score / max(1, len(text.tokens)))

    @property
    def ended(self) -> bool:
        """Whether a token has ended each of them."""
        return all(text.ended for text in self.texts)

    def __len__(self) -> int:
        """How many there will be."""
        return self._most
