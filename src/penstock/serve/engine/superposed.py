"""What is told of continuations that were computed in one row."""

from __future__ import annotations

from penstock.serve.choose.logprobs import LogprobRows, TokenLogprobs
from penstock.serve.choose.superposed import SuperposedText
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Delta, Finish


def told(sequence: Sequence, finish: Finish, version: int) -> list[Delta]:
    """The news of all continuations that ``sequence`` stands for, as far as they have come, once it ends: those that a
    token has ended have stopped, and the others end as ``finish`` says. Before its first token there is nothing in
    them."""
    superposed = sequence.superposed
    assert superposed is not None
    texts = [*superposed.ranked, *[SuperposedText()] * (len(superposed) - len(superposed.texts))]
    prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
    most = sequence.sampling.logprobs
    return [
        Delta(
            sequence.request.id,
            index,
            list(text.tokens),
            None if most is None else LogprobRows.of(_cut(each, most) for each in text.logprobs),
            None if index or not prompt_logprobs else LogprobRows.stacked(prompt_logprobs),
            Finish.STOP if text.ended else finish,
            max(sequence.cached, 0),
            version=version,
        )
        for index, text in enumerate(texts)
    ]


def _cut(told: TokenLogprobs, most: int) -> TokenLogprobs:
    """What was ``told`` of a token, with no more than so many alternatives."""
    return TokenLogprobs(told.token, told.logprob, told.rank, told.top[:most], told.entropy, told.certainty)
