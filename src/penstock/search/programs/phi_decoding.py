"""phi-decoding: steps are chosen by what they are foreseen to lead to."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.allotting import prune
from penstock.search.shared.resampling import normalised


@policy("search.program", "phi_decoding", papers=[98])
class PhiDecoding(Program):
    """Keeps ``beams`` texts. Each is continued by ``candidates`` steps; for each of these the future is simulated by
    ``foresight`` tokens, and the ones that go on are drawn from the mean of two distributions: one by how much more
    probable its future is than that of the step before (a softmax over the gains), one by how many of the futures say
    the same. It needs no scorer.

    Improbable steps are dropped before their future is simulated (in width), and where enough futures agree, texts are
    written to their end without further choice (in depth).

    From the paper: foresight, both distributions, their mean, both kinds of pruning. Ours: a future is worth its mean
    log-probability a token; futures say the same where they do but for digits, case and blanks, where the paper
    clusters embeddings; a step is improbable where its mean log-probability is ``narrow`` deviations below the mean.

    Attributes:
        beams: texts at a time.
        candidates: steps that are drawn for each.
        foresight: tokens of a future.
        temperature: of the gains.
        narrow: deviations below the mean at which a step is dropped.
        agree: the share of futures that say the same at which choosing ends.
        steps: with a choice, at most.
    """

    beams: PositiveInt = 2
    candidates: PositiveInt = 3
    foresight: PositiveInt = 16
    temperature: PositiveFloat = 0.1
    narrow: NonNegativeFloat = 1.0
    agree: Annotated[float, Field(gt=0, le=1)] = 0.8
    steps: PositiveInt = 16

    async def run(self, search: Search) -> Branch | None:
        beams, before, joint = [search.root], {search.root: 0.0}, [1.0]
        for _ in range(self.steps if self.beams * self.candidates > 1 else 0):
            going = [each for each in beams if not each.finished]
            if not going or search.exhausted:
                break
            drawn = [child for each in going for child in each.fork(self.candidates)]
            await search.extend(drawn, step=True)
            steps = wide(drawn, self.narrow)
            prune(drawn, steps)
            futures = [each if each.finished else each.fork(1)[0] for each in steps]
            await search.extend(futures, tokens=self.foresight)
            # Of a step that ended its text, it is its own future.
            begun = [step.start if step.finished else len(step.tokens) for step in steps]
            worth = [_worth(future, place) for future, place in zip(futures, begun, strict=True)]
            gains = [value - before[_parent(step)] for value, step in zip(worth, steps, strict=True)]
            clusters = [
                _cluster(each.texts.decode(each.tokens[place:])) for each, place in zip(futures, begun, strict=True)
            ]
            joint = phi(gains, clusters, self.temperature)
            chosen = _drawn(search, joint, min(self.beams, len(steps)))
            beams = [each for each in beams if each.finished] + [steps[place] for place in chosen]
            before = dict(zip(steps, worth, strict=True))
            for future, step in zip(futures, steps, strict=True):
                if future is not step:
                    future.drop()
            prune(steps, beams)
            if max(Counter(clusters).values()) >= self.agree * len(clusters):
                break
        texts = [each if each.finished else each.fork(1)[0] for each in beams]
        await search.extend(texts)
        return max(texts, key=lambda each: (each.finished, _worth(each, each.prompt)))

    @classmethod
    def limit(cls) -> Program:
        return cls(beams=1, candidates=1)


def phi(gains: Sequence[float], clusters: Sequence[str], temperature: float) -> list[float]:
    """The mean of the softmax of ``gains`` and of the shares of the clusters' sizes."""
    sizes = Counter(clusters)
    whole = sum(sizes[each] for each in clusters)
    foreseen = normalised([gain / temperature for gain in gains])
    return [(share + sizes[each] / whole) / 2 for share, each in zip(foreseen, clusters, strict=True)]


def wide(steps: Sequence[Branch], narrow: float) -> list[Branch]:
    """Those of ``steps`` that are not improbable, at least one."""
    values = [_worth(each, each.start) for each in steps]
    least = statistics.fmean(values) - narrow * statistics.pstdev(values)
    return [each for each, value in zip(steps, values, strict=True) if value >= least - 1e-12]


def _worth(branch: Branch, begun: int) -> float:
    """The mean log-probability of its tokens from the place ``begun`` on."""
    found = branch.logprobs[begun - branch.prompt :]
    return math.fsum(found) / max(1, len(found))


def _parent(step: Branch) -> Branch:
    assert step.parent is not None
    return step.parent


def _cluster(text: str) -> str:
    return "".join(letter for letter in text.lower() if not letter.isspace() and not letter.isdigit())


def _drawn(search: Search, chances: Sequence[float], count: int) -> list[int]:
    """``count`` places, none twice, drawn one after the other."""
    left, found = list(chances), []
    for _ in range(count):
        found.append(search.choose(left))
        left[found[-1]] = 0.0
    return found
