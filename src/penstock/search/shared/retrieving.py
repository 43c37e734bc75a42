"""Finding documents for a question, by the words that they share."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


def bm25(query: str, documents: Sequence[str], k: float = 1.2, b: float = 0.75) -> list[float]:
    """How well each of the ``documents`` fits the ``query`` (Okapi BM25, Robertson et al. 1994): summed over its words,
    log(1 + (N - n + 1/2) / (n + 1/2)) f (k + 1) / (f + k (1 - b + b length / mean length)), where n of the N documents
    have the word, and this one has it f times."""
    bags = [Counter(_words(each)) for each in documents]
    lengths = [bag.total() for bag in bags]
    mean = sum(lengths) / max(1, len(lengths)) or 1.0
    scores = [0.0] * len(documents)
    for word in dict.fromkeys(_words(query)):
        having = sum(word in bag for bag in bags)
        rare = math.log(1 + (len(bags) - having + 0.5) / (having + 0.5))
        for place, (bag, length) in enumerate(zip(bags, lengths, strict=True)):
            count = bag[word]
            scores[place] += rare * count * (k + 1) / (count + k * (1 - b + b * length / mean))
    return scores


def nearest(query: str, documents: Sequence[str], count: int) -> list[int]:
    """The places of the ``count`` documents that fit the ``query`` best, the best first; of equals, the earlier. Those
    that share no word with it are left out."""
    scores = bm25(query, documents)
    order = sorted(range(len(documents)), key=lambda place: -scores[place])
    return [place for place in order if scores[place] > 0][:count]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
