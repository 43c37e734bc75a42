"""Tokens that a request forbids."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as List

import numpy as np

from penstock.core.errors import UsageError
from penstock.serve.choose.sampling import SamplingParams


class Restriction:
    """Which tokens may come next in a sequence whose request allows some alone, or has bad words: none but the allowed
    ones, none that would complete a bad word, and none that would end the text before ``min_tokens``.

    Args:
        sampling: of the request; its bad words are tokens.
        stop: tokens that end the sequence.
        vocabulary: how many tokens there are.

    Attributes:
        words: how many words of 32 bits have one for each token.
        reach: how many of the last generated tokens have to be known.
    """

    def __init__(self, sampling: SamplingParams, stop: Collection[int], vocabulary: int) -> None:
        longer: dict[int, list[list[int]]] = {}
        may = np.full(vocabulary, sampling.allowed_tokens is None)
        may[list(sampling.allowed_tokens or ())] = True
        for word in sampling.bad_words:
            if isinstance(word, str):
                raise UsageError("a bad word is text, and an engine knows tokens: use sampling.tokenized(encode, bare)")
            if len(word) == 1:
                may[word[0]] = False
            else:
                longer.setdefault(word[-1], []).append(list(word[:-1]))
        self.words = -(-vocabulary // 32)
        self.reach = max((len(lead) for leads in longer.values() for lead in leads), default=0)
        self._leads, self._least, self._ends = longer, sampling.min_tokens, frozenset(stop)
        self._may = may
        bits = np.packbits(np.pad(may, (0, 32 * self.words - vocabulary)), bitorder="little")
        self._bits = bits.view("<i4").astype(np.int32)

    def clear(self, row: np.ndarray, generated: int, recent: List[int]) -> None:
        """Clears bit i of ``row`` (int32 [at least words], as a grammar's matcher writes it) where token i may not come
        behind so many ``generated`` tokens, of which these are the most ``recent``."""
        row[: self.words] &= self._bits
        row[self.words :] = 0
        words = row.view(np.uint32)
        for token in self._forbidden(generated, recent):
            words[token >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token & 31)))

    def refuses(self, token: int, generated: int, recent: List[int]) -> bool:
        """Whether ``token`` may not come there. Where all are forbidden, one comes all the same, and is refused."""
        return not self._may[token] or token in self._forbidden(generated, recent)

    def _forbidden(self, generated: int, recent: List[int]) -> set[int]:
        """Those that may not come here and may elsewhere."""
        found = {
            last
            for last, leads in self._leads.items()
            if any(len(lead) <= len(recent) and recent[len(recent) - len(lead) :] == lead for lead in leads)
        }
        return found | self._ends if generated < self._least else found


def restriction_of(sampling: SamplingParams, stop: Collection[int], vocabulary: int) -> Restriction | None:
    """The restriction of a sequence; None where its request forbids nothing of the kind.

    Raises:
        UsageError: a bad word is text.
    """
    if sampling.allowed_tokens is None and not sampling.bad_words:
        return None
    return Restriction(sampling, stop, vocabulary)
