"""The contract ``search.planner``: which model, how long a text, and how many of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from penstock.core.errors import UsageError
from penstock.models.config import DecoderConfig
from penstock.ops.paged.selection import BlockSelection
from penstock.plan.hardware import Hardware
from penstock.policy import Policy, contract, unwritten
from penstock.search.ledger import Wish
from penstock.search.prices import Prices, Unit


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn for a problem.

    Attributes:
        prompt: its tokens.
        lengths: tokens of each text, what ended it among them.
        right: whether each is right.
    """

    prompt: int
    lengths: tuple[int, ...]
    right: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model of the shape ``model``, and what it drew for each of some problems, as many texts for one as for the
    other. ``sparse`` is what the tokens of these texts read; None is all before them."""

    name: str
    model: DecoderConfig
    drawn: tuple[Drawn, ...]
    sparse: BlockSelection | None = None

    @property
    def samples(self) -> int:
        """Texts of a problem."""
        return len(self.drawn[0].lengths)


@dataclasses.dataclass(frozen=True)
class Choice:
    """``samples`` texts of the model ``name``, each cut off after ``length`` tokens: the share of problems for which
    one of them is right, and what a problem costs on average. ``sparse`` is what their tokens read, as of
    :class:`Candidate`."""

    name: str
    length: int
    samples: int
    accuracy: float
    cost: float
    sparse: BlockSelection | None = None


@contract(
    "search.planner",
    law="in the case that the policy gives, a choice costs what the ledger of a search that draws it counts, with "
    "dense and with sparse attention, which is the arithmetic and the bytes of a real decoder; longer texts and more "
    "of them cost no less; the choice is within the budget, and trying every model, attention, length and number finds "
    "none that is right more often, or as often for less; a budget that pays for no choice is refused",
)
class Planner(Policy):
    """Chooses model, length and number of the texts that a budget is spent on, by what models drew for problems of the
    kind.

    A policy gives :meth:`prices`, what tokens cost, and :meth:`limit` for its law. How often one of k texts is right is
    the unbiased estimate from those that were drawn, where a text that would have been longer counts as wrong.
    """

    def prices(
        self, model: DecoderConfig, hardware: Hardware, width: int = 2, selection: BlockSelection | None = None
    ) -> Prices:
        """What tokens of ``model`` cost, with numbers of ``width`` bytes, where those behind a prompt read what
        ``selection`` says; all, if it is None."""
        raise NotImplementedError

    @classmethod
    def limit(cls) -> Planner:
        """The case in which tokens cost what a search's ledger counts."""
        raise unwritten(cls, "limit()", "return cls(...) with options under which tokens cost what the ledger counts")

    def choose(
        self, candidates: Sequence[Candidate], budget: float, unit: Unit, hardware: Hardware, width: int = 2
    ) -> Choice:
        """The choice that is right most often of those that cost no more than ``budget``, in ``unit``, a problem.

        Raises:
            UsageError: all cost more.
        """
        found = self.frontier(candidates, unit, hardware, width)
        paid = [each for each in found if each.cost <= budget]
        if not paid:
            least = f"the least costs {found[0].cost:.4g}" if found else "no text that was drawn is right"
            raise UsageError(f"{budget:.4g} {unit} a problem pay for no choice: {least}")
        return paid[-1]

    def frontier(self, candidates: Sequence[Candidate], unit: Unit, hardware: Hardware, width: int = 2) -> list[Choice]:
        """The choices than which none is right as often for less, the cheapest first."""
        every = [
            choice
            for candidate in candidates
            for choice in _choices(candidate, unit, self.prices(candidate.model, hardware, width, candidate.sparse))
        ]
        best: list[Choice] = []
        for choice in sorted(every, key=lambda each: (each.cost, -each.accuracy)):
            # Estimates that differ in the last bits are the same.
            if choice.accuracy > (best[-1].accuracy if best else 0.0) + 1e-12:
                best.append(choice)
        return best


def _choices(candidate: Candidate, unit: Unit, prices: Prices) -> Iterator[Choice]:
    """Every choice of a candidate that may be the best for some budget: between two lengths at which right texts end,
    the shorter is right as often, for less."""
    drawn, samples = candidate.drawn, candidate.samples
    lengths, right = np.array([each.lengths for each in drawn]), np.array([each.right for each in drawn])
    missed = _missed(samples)
    prompt = float(np.mean([_price(each.prompt, 0, 1, unit, prices) - _price(each.prompt, 1, 1, unit, prices)
                            for each in drawn]))  # fmt: skip
    texts = np.array(
        [[[_price(each.prompt, 1, count, unit, prices)] for count in range(1, lengths.max() + 1)] for each in drawn]
    )[..., 0]
    rows = np.arange(len(drawn))[:, None]
    for length in np.unique(lengths[right]).tolist():
        covered = 1 - missed[(right & (lengths <= length)).sum(1)].mean(0)
        text = float(texts[rows, np.minimum(lengths, length) - 1].mean())
        for k in range(1, samples + 1):
            yield Choice(candidate.name, length, k, float(covered[k - 1]), prompt + k * text, candidate.sparse)


def _price(prompt: int, forked: int, count: int, unit: Unit, prices: Prices) -> float:
    """Of a text of ``count`` tokens, as the ledger counts: the first computes the prompt, the others are ``forked`` and
    compute its last token alone."""
    return Wish(prompt, prompt - 1 if forked else 0, count, prices, prompt).price(unit, count)


def _missed(samples: int) -> np.ndarray:
    """[samples + 1, samples]: the chance that k of the samples, in column k - 1, are all wrong, where so many are right
    as the row says: C(n - c, k) / C(n, k)."""
    right, drawn = np.arange(samples + 1)[:, None], np.arange(samples)
    return np.cumprod(np.clip(samples - right - drawn, 0, None) / (samples - drawn), axis=1)
