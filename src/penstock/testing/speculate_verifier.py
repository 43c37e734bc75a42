"""The law of ``speculate.verifier``: whatever is drafted, the token that comes out has the target's distribution.

All drafts are enumerated, so that nothing depends on luck. What each clause is there to catch:

- :func:`check_pair` on many pairs of distributions, with tokens that only one of them has: a draft that is accepted too
  often or too seldom, a residual that is not what the drafts left over, a token that the target forbids; a verifier
  that accepts less than it promises, or less for more drafts; and one that counts what it did not accept, since nothing
  exceeds the optimum;
- :func:`check_example`: one that is exact and accepts less than it should;
- :func:`check_rows`: places that are mixed up, or drafts that are not there (-1) taken for some;
- :func:`check_precision`: differences in float32 of figures that are nearly the same;
- :func:`check_sequences`: the same over several tokens, where what is left of a draft goes on behind an accepted token,
  for chains that fork and for trees.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from penstock.core.randomness import numpy_generator
from penstock.speculate.drafting import Drafting
from penstock.speculate.verifiers.contract import Verifier

#: How far a probability may be off, in float64.
EXACT = 1e-12

#: How much less may be accepted for one draft more: what is found by iteration ends a little off its optimum.
ROUGHLY = 1e-6

#: Drafts of a place, at most.
MOST = 3

#: Targets and proposals that are hard in some way.
HARD = (
    ([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),  # the same
    ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]),  # nothing in common
    ([0.0, 1.0, 0.0], [0.6, 0.3, 0.1]),  # greedy
    ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]),  # greedy, and wrong
    ([0.2, 0.5, 0.3], [0.0, 1.0, 0.0]),  # one token can be drafted
    ([0.2, 0.0, 0.5, 0.3], [0.7, 0.3, 0.0, 0.0]),  # a token in common
    ([0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]),
    ([0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]),
    ([1 - 1e-9, 1e-9, 0.0], [1e-9, 1 - 2e-9, 1e-9]),
    ([0.5, 0.5 - 1e-13, 1e-13], [0.5 + 1e-13, 0.5 - 1e-13, 0.0]),  # the same but for rounding
)

Distribution = Sequence[float]


def check(verifier: Verifier) -> None:
    """Asserts the law."""
    check_example(verifier)
    for target, proposal in itertools.chain(HARD, pairs(12)):
        check_pair(verifier, target, proposal)
    check_rows(verifier)
    check_precision(verifier)
    check_sequences(verifier)


def check_example(verifier: Verifier) -> None:
    """Asserts that the acceptance is what the policy's example says."""
    target, proposal, wanted = verifier.example()
    assert wanted, "the example says no acceptance"
    for count, acceptance in enumerate(wanted, 1):
        found = _Enumeration(verifier, target, proposal, count).acceptance
        assert math.isclose(found, acceptance, abs_tol=1e-9), f"{count} drafts: {found:.9f}, not {acceptance:.9f}"


def check_pair(verifier: Verifier, target: Distribution, proposal: Distribution) -> None:
    """Asserts the law of one place, for 1 to 3 drafts."""
    before = 0.0
    for count in _counts(verifier):
        found = _Enumeration(verifier, target, proposal, count)
        what = f"{count} drafts of {list(proposal)} for {list(target)}"
        assert found.chances.shape == (len(found.drafts), len(target)), what
        assert (found.chances >= 0).all() and ((found.chances.sum(-1) - 1).abs() <= EXACT).all(), what
        assert not found.chances[:, [share == 0 for share in target]].any(), f"a forbidden token comes out: {what}"
        away = (found.law - torch.tensor(target, dtype=torch.float64)).abs().sum() / 2
        assert away <= EXACT, f"the target's distribution is missed by {away:.1e}: {what}"
        best = optimum(target, proposal, count, verifier.drafting)
        assert found.acceptance <= best + EXACT, f"{found.acceptance} is accepted, more than {best}: {what}"
        least = verifier.guarantee * best - EXACT
        assert found.acceptance >= least, f"{found.acceptance} is accepted, of {best} at best: {what}"
        assert found.acceptance >= before - ROUGHLY, f"less than with a draft less, which was {before}: {what}"
        before = found.acceptance


def check_rows(verifier: Verifier) -> None:
    """Asserts that places of a batch, with as many drafts as each has, are verified as each is alone."""
    drafting, most, vocabulary = verifier.drafting, max(_counts(verifier)), 5
    generator = numpy_generator(0, "testing/verifier/rows")
    targets, proposals, drafted = [], [], []
    for number, (target, proposal) in enumerate(pairs(12, vocabulary)):
        drafts, _ = all_drafts(proposal, number % (most + 1), drafting)
        targets.append(target)
        proposals.append(proposal)
        drafted.append(drafts[generator.integers(len(drafts))])
    together = _chances(verifier, targets, proposals, drafted, most)
    for row, (target, proposal, own) in enumerate(zip(targets, proposals, drafted, strict=True)):
        alone = _chances(verifier, [target], [proposal], [own], max(1, len(own)))
        assert (together[row] - alone[0]).abs().max() <= EXACT, f"row {row} of a batch differs from the same alone"
        if not own:
            away = (alone[0] - torch.tensor(target, dtype=torch.float64)).abs().max()
            assert away <= EXACT, "nothing was drafted, and the target is not what comes out"


def check_precision(verifier: Verifier) -> None:
    """Asserts that in float32 the target's distribution is kept as nearly as float32 allows."""
    for target, proposal in itertools.chain(HARD, pairs(6)):
        for count in _counts(verifier):
            found = _Enumeration(verifier, target, proposal, count, torch.float32)
            assert found.chances.dtype == torch.float32
            away = (found.law - torch.tensor(target, dtype=torch.float64)).abs().sum() / 2
            assert away <= 2e-6, f"in float32 the target's distribution is missed by {away:.1e}"


#: Chances of the token (column) after the token (row), of a target and a proposal for sequences.
TARGET = ((0.2, 0.5, 0.3), (0.6, 0.0, 0.4), (0.1, 0.8, 0.1))
PROPOSAL = ((0.5, 0.25, 0.25), (0.3, 0.4, 0.3), (0.0, 0.3, 0.7))


def check_sequences(verifier: Verifier, length: int = 4, depth: int = 2) -> None:
    """Asserts that ``length`` tokens after the first have the target's distribution, where ``depth`` of them are
    drafted at a time.

    Independent drafts are so many chains, of which those go on that have the token that came out; the others are a
    tree, in which as many drafts follow each.
    """
    count = min(2, max(_counts(verifier)))

    @functools.cache
    def settle(last: int, drafts: int) -> _Enumeration:
        return _Enumeration(verifier, TARGET[last], PROPOSAL[last], drafts, most=count)

    # Of each text so far, places that are drafted from there on and drafts at the first of them.
    states: dict[tuple[tuple[int, ...], int, int], float] = {((0,), depth, count): 1.0}
    for _ in range(length):
        ahead: defaultdict[tuple[tuple[int, ...], int, int], float] = defaultdict(float)
        for (text, places, drafts), chance in states.items():
            found = settle(text[-1], drafts if places else 0)
            for row, drafted in enumerate(found.drafts):
                for token, share in enumerate(found.chances[row].tolist()):
                    if token in drafted:
                        follow = drafted.count(token) if verifier.drafting is Drafting.INDEPENDENT else count
                        state = (*text, token), places - 1, follow
                    else:
                        state = (*text, token), depth, count
                    ahead[state] += chance * found.weights[row].item() * share
        states = ahead
    law: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for (text, *_), chance in states.items():
        law[text] += chance
    away = 0.0
    for tokens in itertools.product(range(len(TARGET)), repeat=length):
        wanted = math.prod(TARGET[one][other] for one, other in itertools.pairwise((0, *tokens)))
        away += abs(law[0, *tokens] - wanted) / 2
    assert away <= EXACT, f"sequences miss the target's distribution by {away:.1e}"


class _Enumeration:
    """All drafts of one place, with what comes out.

    Attributes:
        drafts: each possible list of drafts.
        weights: float64 [D], how probable each is.
        chances: [D, V], the distribution of what comes out of each.
    """

    def __init__(
        self,
        verifier: Verifier,
        target: Distribution,
        proposal: Distribution,
        count: int,
        dtype: torch.dtype = torch.float64,
        most: int | None = None,
    ) -> None:
        self.drafts, weights = all_drafts(proposal, count, verifier.drafting)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        size = len(self.drafts)
        self.chances = _chances(verifier, [target] * size, [proposal] * size, self.drafts, most or count, dtype)

    @property
    def law(self) -> Tensor:
        """The distribution float64 [V] of what comes out."""
        return (self.weights.unsqueeze(-1) * self.chances.double()).sum(0)

    @property
    def acceptance(self) -> float:
        """How probable it is that what comes out was drafted."""
        hits = torch.zeros_like(self.chances)
        for row, drafts in enumerate(self.drafts):
            hits[row, list(drafts)] = 1
        return float((self.weights * (self.chances * hits).sum(-1)).sum())


def _chances(
    verifier: Verifier,
    targets: Sequence[Distribution],
    proposals: Sequence[Distribution],
    drafts: Sequence[Sequence[int]],
    most: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What the verifier says of rows that are given as lists."""
    drafted = torch.tensor([[*row, *[-1] * (most - len(row))] for row in drafts])
    return verifier.chances(torch.tensor(targets, dtype=dtype), torch.tensor(proposals, dtype=dtype), drafted)


def _counts(verifier: Verifier) -> range:
    return range(1, 1 + min(MOST, verifier.most or MOST))


def all_drafts(proposal: Distribution, count: int, drafting: Drafting) -> tuple[list[tuple[int, ...]], list[float]]:
    """All lists of ``count`` drafts, and how probable each is; shorter ones where the proposal has fewer tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for place in range(count):
        ahead: dict[tuple[int, ...], float] = {}
        for drafts, chance in found.items():
            others = {
                token: share
                for token, share in enumerate(proposal)
                if share > 0 and (drafting is Drafting.INDEPENDENT or token not in drafts)
            }
            if drafting is Drafting.GREEDY and place < count - 1:
                others = dict(sorted(others.items(), key=lambda item: -item[1])[:1])
            whole = sum(others.values())
            ahead.update({(*drafts, token): chance * share / whole for token, share in others.items()})
            if not others:
                ahead[drafts] = chance
        found = ahead
    return list(found), list(found.values())


def optimum(target: Distribution, proposal: Distribution, count: int, drafting: Drafting) -> float:
    """The optimal acceptance, by the dual of the transport problem: over all sets of tokens, 1 and the target's
    probability of the set less that of all drafts being in it."""
    drafts, weights = all_drafts(proposal, count, drafting)
    held = [(set(each), weight) for each, weight in zip(drafts, weights, strict=True)]
    best = 1.0
    for size in range(1, len(target) + 1):
        for chosen in itertools.combinations(range(len(target)), size):
            inside = sum(weight for each, weight in held if each.issubset(chosen))
            best = min(best, 1 + sum(target[token] for token in chosen) - inside)
    return best


def pairs(number: int, vocabulary: int | None = None) -> Iterator[tuple[list[float], list[float]]]:
    """Random targets and proposals over ``vocabulary`` tokens, or 2 to 5, from flat to steep, with zeros."""
    for each in range(number):
        draw = numpy_generator(each, "testing/verifier")
        size = vocabulary or int(draw.integers(2, 6))
        pair = []
        for _ in range(2):
            shares = draw.random(size) ** draw.choice([0.5, 2, 8])
            gone = draw.random(size) < 0.25
            gone[draw.integers(size)] = False
            shares[gone] = 0
            pair.append((shares / shares.sum()).tolist())
        yield pair[0], pair[1]
