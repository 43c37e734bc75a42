"""What each continuation should say, by the reference decoder, and what it has said."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.models.sampling import Sampling
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.sequence import Sequence as EngineSequence
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.policies.full import Full
from penstock.serve.messages import Finish, Request
from penstock.testing.engine.pairs import END, may_follow
from penstock.testing.engine.requests import CONTRAST
from penstock.testing.kept_scores import KeptScores
from penstock.testing.reference import Scores, charged, continued, prompt_logprobs

FULL = Full()

#: Where the caches of a sequence and of its companions were compressed; None is where the policy is due.
Places = tuple[tuple[int, ...], ...] | None

#: What is known to follow a text, by what decides it.
_FOLLOWS: dict[tuple[object, ...], list[int]] = {}


def expected(
    model: Decoder,
    tokens: tuple[int, ...],
    given: int,
    asked: SamplingParams,
    seed: int,
    count: int,
    guess: Sequence[int],
    kv: CachePolicy = FULL,
    places: Places = None,
    begun: int = 0,
) -> list[int]:
    """The ``count`` tokens that follow ``tokens`` by ``model``, of which so many were ``given``, drawn by ``seed`` and
    else as was ``asked``. The grammar's text has ``begun`` behind so many tokens; what comes behind its end means
    nothing."""
    charges = asked.repetition_penalty, asked.frequency_penalty, asked.presence_penalty
    kind = asked.temperature, seed, asked.rule, charges, None if asked.grammar is None else begun
    known = _FOLLOWS.setdefault((model, tokens, given, kind, kv, places), [])
    if len(known) < count:
        text = [*tokens, *known]
        sampling = Sampling(temperature=asked.temperature, seed=seed, max_tokens=len(tokens) + count - given)
        compressed: Iterable[tuple[int, ...] | None] = places or itertools.repeat(None)
        scores = Scores if kv == FULL else functools.partial(_kept, kv, iter(compressed))
        rule = CONTRAST if asked.rule is not None else None
        change = functools.partial(_changed, asked, given, begun)
        known += continued(model, text, given, sampling, rule, guess[len(known) :], scores, change)
    return known[:count]


def _changed(asked: SamplingParams, given: int, begun: int, scores: Tensor, text: Sequence[int]) -> Tensor:
    """The scores of what follows ``text`` after penalties and the grammar."""
    found = charged(scores, asked, text, given) if asked.penalized else scores.clone()
    if asked.grammar is not None and END not in text[begun:]:
        found[[token for token in range(len(found)) if not may_follow(text[begun:], token)]] = -torch.inf
    return found


def _kept(
    kv: CachePolicy,
    places: Iterator[tuple[int, ...] | None],
    model: Decoder,
    likely: Sequence[int],
    prompt: int,
) -> KeptScores:
    return KeptScores(model, kv, prompt, next(places))


@functools.cache
def rated(
    model: Decoder, prompt: tuple[int, ...], given: int = 0, kv: CachePolicy = FULL, places: Places = None
) -> list[float]:
    """The log-probabilities of the tokens of ``prompt`` but the first."""
    if kv == FULL:
        return prompt_logprobs(model, prompt)
    scores = KeptScores(model, kv, given, places[0] if places else None).every(prompt)
    return [float(each.log_softmax(-1)[token]) for each, token in zip(scores, prompt[1:], strict=False)]


#: A request and one of its continuations.
Name = tuple[str, int]


@dataclasses.dataclass
class Account:
    """What is known of one continuation: its ``text`` when it was touched last, of which ``given`` tokens were its
    prompt, its ``limit`` of tokens in all, what its cache keeps (``kv``), behind how many tokens its grammar begins
    (``begun``), and the tokens that were ``told``; the ``model`` says what they should be. The engine has it as
    ``sequence``.
    """

    model: Decoder
    request: Request
    index: int
    text: list[int]
    given: int
    limit: int
    kv: CachePolicy
    sequence: EngineSequence
    begun: int
    touched: bool = False
    told: list[int] = dataclasses.field(default_factory=list)
    finish: Finish | None = None
    aborted: bool = False

    @property
    def places(self) -> Places:
        """Where its cache was compressed, which the load decides where the policy is patient."""
        return tuple(tuple(each.compressed) for each in self.sequence.lockstep) if self.kv.patient else None

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end it."""
        sampling = self.request.sampling
        ignored = sampling.ignore_eos and sampling.grammar is None
        return frozenset(sampling.stop_tokens) | (frozenset() if ignored else {END})

    def allows(self, text: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether its grammar, if it has one, allows ``tokens`` behind ``text``."""
        behind = [*text[self.begun :], *tokens]
        places = range(len(behind) - len(tokens), len(behind))
        return self.request.sampling.grammar is None or all(
            END not in behind[:place] and may_follow(behind[:place], behind[place]) for place in places
        )

    @property
    def ahead(self) -> list[int]:
        """What follows the text."""
        sampling, ends = self.request.sampling, self.ends
        seed = sampling.seed + self.index if sampling.temperature else 0  # greedy ones are all the same
        left = self.limit - len(self.text)
        guess = self.told[-left:] if self.touched else self.told
        for count in (min(len(guess), left), left):
            asked = (self.model, tuple(self.text), self.given, sampling, seed)
            follows = expected(*asked, count, guess, self.kv, self.places, self.begun)
            place = next((place for place, token in enumerate(follows) if token in ends), None)
            if place is not None:
                return follows[: place + 1]
        return follows
