"""The oracle: decoding that is too simple to be wrong.

Every token is computed from the whole sequence anew: no cache, no batch. Sampling follows the definitions, in float64.
Engines are tested against this, so nothing here is shared with them but a rule's own arithmetic. What an engine has
said may be given as a guess: as far as it turns out right, one pass over the sequence scores every place of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.core.randomness import derive, uniforms
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.sampling import Sampling
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.decode.uscd import UncertaintyAwareContrast

#: By how much cumulated probabilities may differ by rounding, where models compute in float32.
ROUNDING = 1e-6


@torch.no_grad()
def next_logits(model: Decoder, tokens: Sequence[int]) -> Tensor:
    """Scores [vocabulary] of the token after ``tokens``, float64, from a forward pass over all of them."""
    device = model.like.device
    row = torch.tensor([list(tokens)], device=device)
    hidden = model(row, CausalRows.of(len(tokens), device)).hidden[0, -1]
    return model.logits(hidden).double().cpu()


@torch.no_grad()
def every_logits(model: Decoder, tokens: Sequence[int]) -> Tensor:
    """Scores [tokens, vocabulary] of what follows each of ``tokens``, float64, from one forward pass over all of them,
    in which none sees those behind it."""
    device = model.like.device
    row = torch.tensor([list(tokens)], device=device)
    return model.logits(model(row, CausalRows.of(len(tokens), device)).hidden[0]).double().cpu()


class Scored(Protocol):
    """What knows the scores of the token after a text."""

    def after(self, tokens: Sequence[int]) -> Tensor:
        """Scores [vocabulary] of the token after ``tokens``, float64."""
        ...


class Scores:
    """The scores of the token after a text, for one text after another.

    Args:
        model: whose they are.
        likely: what the texts are prefixes of, most of them.
    """

    def __init__(self, model: Decoder, likely: Sequence[int], given: int = 0) -> None:
        self._model, self._likely = model, list(likely)
        self._rows: Tensor | None = None

    def after(self, tokens: Sequence[int]) -> Tensor:
        """Scores [vocabulary] of the token after ``tokens``, float64."""
        if list(tokens) != self._likely[: len(tokens)]:
            return next_logits(self._model, tokens)
        if self._rows is None:
            self._rows = every_logits(self._model, self._likely)
        return self._rows[len(tokens) - 1]


def greedy(model: Decoder, prompt: Sequence[int], count: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """The ``count`` tokens after ``prompt``, each the most probable one, ending early before a token of ``stop``."""
    tokens = list(prompt)
    for _ in range(count):
        token = int(next_logits(model, tokens).argmax())
        if token in stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def distribution(logits: Tensor, sampling: Sampling) -> list[float]:
    """The probability of every token under ``sampling``, token by token as the definitions say.

    Args:
        logits: [vocabulary].
        sampling: the cuts, applied in the order temperature, top-k, top-p, min-p.
    """
    scores = [float(x) for x in logits.double()]
    ranked = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if sampling.temperature == 0:
        return [float(token == ranked[0]) for token in range(len(scores))]
    if sampling.top_k is not None:
        # Tokens that tie with the k-th stay.
        least = scores[ranked[min(sampling.top_k, len(ranked)) - 1]]
        ranked = [token for token in ranked if scores[token] >= least]
    weights = [math.exp((scores[token] - scores[ranked[0]]) / sampling.temperature) for token in ranked]
    total = math.fsum(weights)
    chances = {token: weight / total for token, weight in zip(ranked, weights, strict=True)}
    if sampling.top_p < 1:
        reached, nucleus = 0.0, {}
        for token in ranked:
            if reached >= sampling.top_p:
                break
            reached, nucleus[token] = reached + chances[token], chances[token]
        chances = nucleus
    if sampling.min_p > 0:
        bound = sampling.min_p * max(chances.values())
        chances = {token: chance for token, chance in chances.items() if chance >= bound}
    total = sum(chances.values())
    return [chances.get(token, 0.0) / total for token in range(len(scores))]


def charged(scores: Tensor, sampling: SamplingParams, tokens: Sequence[int], given: int) -> Tensor:
    """``scores`` [vocabulary] of what follows ``tokens``, of which so many were ``given``, after biases and penalties,
    token by token as the definitions say."""
    found = scores.clone()
    for token, bias in sampling.logit_bias.items():
        found[token] += bias
    for token in set(tokens):
        count, own = list(tokens[given:]).count(token), found[token]
        own = own / sampling.repetition_penalty if own > 0 else own * sampling.repetition_penalty
        found[token] = own - sampling.frequency_penalty * count - sampling.presence_penalty * (count > 0)
    return found


def pick(chances: Sequence[float], uniform: float) -> int:
    """The first token at which the cumulated ``chances`` exceed ``uniform``, a number in [0, 1), times their sum."""
    reached = list(itertools.accumulate(chances))
    return next(token for token, sum_ in enumerate(reached) if sum_ > uniform * reached[-1])


def picked(chances: Sequence[float], uniform: float, said: int | None) -> int:
    """What ``uniform`` picks from ``chances``; or what was ``said``, if that is as right but for rounding."""
    token = pick(chances, uniform)
    if said is None or said == token or not chances[said]:
        return token
    reached = list(itertools.accumulate(chances))
    aim, slack = uniform * reached[-1], ROUNDING * reached[-1]
    return said if reached[said] - chances[said] - slack <= aim <= reached[said] + slack else token


def continued(
    model: Decoder,
    tokens: Sequence[int],
    given: int,
    sampling: Sampling,
    rule: UncertaintyAwareContrast | None = None,
    guess: Sequence[int] = (),
    scores: Callable[[Decoder, Sequence[int], int], Scored] | None = None,
    changed: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
) -> list[int]:
    """What follows ``tokens``, of which the first ``given`` are the prompt and the others generated: as ``sampling``
    says, up to ``sampling.max_tokens`` generated ones in all. The draw of a token depends on the seed and on how many
    were generated before alone. With a ``rule`` the scores are contrasted with those after the rule's own prompt. A
    right ``guess`` of what follows makes it quicker, and a wrong one changes nothing, but for a token that a draw
    misses by rounding alone. ``scores`` makes what scores texts, of the model, what they are likely to be prefixes of,
    and how many tokens of them are given; if not told, the plain one. ``changed`` makes of the scores behind a text,
    before the rule, those by which a token is chosen."""
    text, likely, of = list(tokens), [*tokens, *guess], scores or Scores
    own = of(model, likely, given)
    beside = [(start, of(model, [*start, *likely[given:]], len(start))) for start in (rule.companions if rule else ())]
    while len(text) - given < sampling.max_tokens:
        count, generated = len(text) - given, text[given:]
        logits = own.after(text)
        if changed is not None:
            logits = changed(logits, text)
        if rule is not None:
            others = [other.after([*start, *generated]) for start, other in beside]
            logits = rule.combine(torch.stack([logits, *others]).float().unsqueeze(0))[0]
        uniform = float(uniforms(derive(sampling.seed, "sample"), np.array([count]))[0])
        said = likely[len(text)] if text == likely[: len(text)] and len(text) < len(likely) else None
        text.append(picked(distribution(logits, sampling), uniform, said))
    return text[len(tokens) :]


def contrasted(model: Decoder, prompt: Sequence[int], sampling: Sampling, rule: UncertaintyAwareContrast) -> list[int]:
    """The tokens after ``prompt`` where the scores are contrasted with those after the rule's own prompt."""
    return continued(model, prompt, len(prompt), sampling, rule)


def prompt_logprobs(model: Decoder, prompt: Sequence[int]) -> list[float]:
    """The log-probability of each token of ``prompt`` but the first, float64, from one forward pass over all of it."""
    scores = every_logits(model, prompt).log_softmax(-1)
    return [float(scores[place, token]) for place, token in enumerate(prompt[1:])]


def sample(model: Decoder, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> list[int]:
    """The tokens after ``prompt``, drawn as ``sampling`` says; the draw of token i depends on the seed and i alone."""
    tokens = continued(model, prompt, len(prompt), sampling)
    return list(itertools.takewhile(lambda token: token not in stop, tokens))
