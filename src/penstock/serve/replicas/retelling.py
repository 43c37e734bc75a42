"""An answer that one replica has begun and another one gives anew."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from penstock.serve.choose.logprobs import LogprobRows
from penstock.serve.messages import Delta


class Retelling:
    """What was told of one request. Its draws are its own, so that any engine with the same model gives the same
    tokens; where one does not, two choices were within rounding of each other."""

    def __init__(self) -> None:
        self._told: dict[int, list[int]] = defaultdict(list)
        self._again: dict[int, int] = {}
        self._scored = False

    def begin_again(self) -> None:
        """The answer comes anew from its beginning."""
        self._again = dict.fromkeys(self._told, 0)

    def rest(self, delta: Delta) -> Delta | None:
        """What is new in ``delta``, None where nothing is.

        Raises:
            ValueError: it is not what was told before.
        """
        told, start = self._told[delta.index], self._again.get(delta.index)
        known = 0
        if start is not None:
            known = min(len(told) - start, len(delta.tokens))
            if delta.tokens[:known] != told[start : start + known]:
                raise ValueError("another answer")
            self._again[delta.index] = start + len(delta.tokens)
        told += delta.tokens[known:]
        scores = None if self._scored else delta.prompt_logprobs
        self._scored = self._scored or scores is not None
        if known == len(delta.tokens) and known and delta.finish is None and scores is None:
            return None
        rows = delta.logprobs
        left = rows if rows is None or not known else LogprobRows(rows.table[known:])
        return msgspec.structs.replace(delta, tokens=delta.tokens[known:], logprobs=left, prompt_logprobs=scores)
