"""An answer that is given anew goes on where it was."""

from __future__ import annotations

import random

import numpy as np
import pytest

from penstock.serve.choose.logprobs import FIXED, LogprobRows
from penstock.serve.messages import Delta, Finish
from penstock.serve.replicas.retelling import Retelling


def rows(tokens: list[int]) -> LogprobRows:
    table = np.zeros((len(tokens), FIXED), np.int32)
    table[:, 0] = tokens
    return LogprobRows(table)


def deltas(draw: random.Random, answer: list[int], index: int) -> list[Delta]:
    """``answer`` in pieces of any length; the first has the prompt's scores."""
    cuts = sorted(draw.sample(range(1, len(answer)), draw.randrange(1, len(answer))))
    pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    last = len(pieces) - 1
    return [
        Delta("r", index, piece, rows(piece), rows([7]) if not place and not index else None, Finish.LENGTH)
        if place == last
        else Delta("r", index, piece, rows(piece), rows([7]) if not place and not index else None)
        for place, piece in enumerate(pieces)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_what_was_told_is_not_told_again(seed):
    """However the answer comes in pieces, and however often it begins anew."""
    draw = random.Random(seed)
    answers = {index: [draw.randrange(9) for _ in range(8)] for index in range(2)}
    telling, told = Retelling(), dict[int, list[int]]()
    scored = []
    for attempt in range(3):
        if attempt:
            telling.begin_again()
        news = [each for index, answer in answers.items() for each in deltas(draw, answer, index)]
        for delta in news if attempt == 2 else news[: draw.randrange(len(news))]:
            rest = telling.rest(delta)
            if rest is not None:
                assert rest.logprobs is not None
                assert [each.token for each in rest.logprobs] == rest.tokens
                told.setdefault(rest.index, []).extend(rest.tokens)
                scored += [rest.prompt_logprobs] if rest.prompt_logprobs is not None else []
    assert told == answers
    assert len(scored) == 1


def test_another_answer_is_noticed():
    telling = Retelling()
    telling.rest(Delta("r", 0, [1, 2]))
    telling.begin_again()
    assert telling.rest(Delta("r", 0, [1])) is None
    with pytest.raises(ValueError, match="another answer"):
        telling.rest(Delta("r", 0, [3]))
