"""Several continuations of a prompt at the cost of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from penstock.models.sampling import Sampling
from penstock.policy import policy
from penstock.serve.decode.contract import DecodeRule, Judge, Limit
from penstock.speculate.texts import Texts


@policy("decode.rule", "superposed", papers=[399])
class Superposed(DecodeRule):
    """Computes all ``n`` continuations of a prompt in one row a token, and gives the likeliest ones (Superposed
    Decoding).

    Pays where several suggestions are wanted at the cost of one, as in an editor. The model does not know the texts
    apart, so that further from the prompt they are less coherent than if each was computed by itself: ask for short
    ones. From the paper: in each pass the model is given one row for all texts, the weighted sum of their last tokens'
    embeddings; the texts are crossed with the tokens that are the likeliest behind it, as many as there are texts; each
    of the crossed ones is scored by the model's probability, mixed with that of n-grams behind the text itself; and the
    best stay, as many as before. From knowledge: the weights, which are the texts' own probabilities. Ours: n-grams are
    of one length, counted in the prompt and not in a corpus, so that a request's texts are its own, mixed by a sum, and
    without a say where the prompt does not have them; a text that has ended is not crossed any more, and stays as long
    as it is among the best; they are given in the order of the mean score of a token. One continuation is what the
    model says greedily. The same in a model that drafts, for the texts to be verified:
    ``speculate.drafter/superposed``.

    Attributes:
        say: how much is the n-grams'; 0 leaves it to the model.
        run: how many tokens have to agree before what followed them in the prompt counts.
    """

    say: Annotated[float, Field(ge=0, lt=1)] = 0.3
    run: Annotated[int, Field(ge=1, le=16)] = 2

    @classmethod
    def limit(cls) -> Limit:
        return Limit(cls(), {"temperature": 0.0})

    def refuses(self, sampling: Sampling) -> str | None:
        if sampling.temperature > 0:
            return "superposed decoding takes the best texts and draws none: set temperature to 0"
        return None

    def judge(self, prompt: Sequence[int]) -> Judge:
        if not self.say:
            return lambda ahead, tokens, logprobs: list(logprobs)
        texts = Texts(self.run, len(prompt))
        text = texts.begin()
        for token in prompt:
            texts.append(text, token)

        def judged(ahead: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]) -> list[float]:
            followed = texts.followers(text, ahead)
            count = followed.total()
            if not count:
                return list(logprobs)
            shares = (followed[token] / count for token in tokens)
            return [_mixed(own, share, self.say) for own, share in zip(logprobs, shares, strict=True)]

        return judged


def _mixed(logprob: float, share: float, say: float) -> float:
    """The logarithm of a probability, given by its own, mixed with another."""
    return logprob + math.log1p(-say) if not share else math.log((1 - say) * math.exp(logprob) + say * share)
