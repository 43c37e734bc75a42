"""The paper trail: each paper of the bibliography with the policies that name it and the figures that test its claim.

Only the bibliography is written by hand; nobody types a status. A paper is

- *simulated* when a registered policy names it, but only a simulator takes it or its contract, or when
  only simulated figures test its claim;
- *implemented* when a user can run a policy that names it: a trainer, a server or a planner takes its contract; or
  when a mechanism names it;
- *measured* when a row of ``bench/results``, timed and not simulated, sets it beside its baseline on the same engine;
- *planned* otherwise.

Nothing here needs torch.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, model_validator

from penstock.core.config import Config, build, read_toml
from penstock.core.errors import UsageError, nearest
from penstock.core.results import Result, Row, Verdict, format_number, repository
from penstock.policy import Entry, Index, sentences

#: How docstrings mark what is not the paper's, and what of the paper is missing.
OURS, NOT_BUILT = (re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for words in ("ours?|we", "not built"))


class Paper(Config):
    """One entry of the bibliography.

    Attributes:
        family: a key of :attr:`Bibliography.families`.
        core: how near it is to training and serving large generative models, from 1 (the edge) to 3 (the centre).
        claim: what the abstract claims, empty where it gives nothing that could be checked.
        code: address of the authors' code, empty where none is known.
    """

    id: NonNegativeInt
    title: str
    family: str
    kind: Literal["algorithm", "system", "model", "study", "benchmark", "theory", "dataset"]
    core: int = Field(ge=1, le=3)
    claim: str = ""
    code: str = ""


class Bibliography(Config):
    """``papers.toml``: the families with their full names, and the papers in ascending order of id."""

    families: dict[str, str]
    papers: tuple[Paper, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for before, paper in itertools.pairwise(self.papers):
            if paper.id <= before.id:
                raise ValueError(f"paper {paper.id} stands after paper {before.id}: ids must ascend")
        for paper in self.papers:
            if paper.family not in self.families:
                raise ValueError(
                    f"paper {paper.id} is of the unknown family {paper.family!r}: "
                    f"{nearest(paper.family, self.families)}"
                )
        return self

    def paper(self, number: int) -> Paper:
        """The paper with that id.

        Raises:
            UsageError: there is none; the message names the nearest ids.
        """
        found = {paper.id: paper for paper in self.papers}
        if number not in found:
            close = sorted(found, key=lambda known: (abs(known - number), known))[:3]
            raise UsageError(
                f"there is no paper {number}: the nearest are {', '.join(map(str, close))}",
                hint="penstock papers --planned lists them all.",
            )
        return found[number]

    def family(self, name: str) -> str:
        """The full name of a family.

        Raises:
            UsageError: there is none; the message names the nearest.
        """
        if name not in self.families:
            raise UsageError(f"there is no family {name!r}: {nearest(name, self.families)}")
        return self.families[name]


def read_bibliography(path: Path) -> Bibliography:
    """Reads a bibliography; a fault in it is an error that names the file and the key."""
    return build(Bibliography, read_toml(path), source=str(path))


@functools.cache
def bibliography() -> Bibliography:
    """The bibliography of this package, read once a process."""
    return read_bibliography(Path(__file__).with_name("papers.toml"))


class Status(enum.StrEnum):
    """How far a paper has come, best first."""

    MEASURED = "measured"
    IMPLEMENTED = "implemented"
    SIMULATED = "simulated"
    PLANNED = "planned"


class Figure(NamedTuple):
    """One row that tests a paper's claim, and the result that it comes from."""

    row: Row
    result: Result


class Finding(NamedTuple):
    """The figures of one run that compare the same two things in the same respect, under one or several settings."""

    rows: Sequence[Row]
    result: Result

    @property
    def verdicts(self) -> str:
        """What the rows say of the claim: ``confirmed``, or ``2 confirmed, 1 contradicted``."""
        return tally(row.verdict for row in self.rows)

    @property
    def ratio(self) -> str:
        """The ratio, or the least and the greatest of them: ``1.180×`` or ``1.042×–1.180×``."""
        ratios = sorted({row.ratio for row in self.rows if row.ratio is not None})
        ends = dict.fromkeys(f"{format_number(ratio)}×" for ratio in (ratios[0], ratios[-1]))
        return "–".join(ends)

    @property
    def setting(self) -> str:
        """The setting, or how many there are."""
        return self.rows[0].setting if len(self.rows) == 1 else f"{len(self.rows)} settings"


def tally(verdicts: Iterable[Verdict | None]) -> str:
    """How many of each verdict there are, without the number where all agree; ``not tested`` where there is none."""
    counts = collections.Counter(verdict for verdict in verdicts if verdict is not None)
    if len(counts) < 2:
        return str(next(iter(counts), "not tested"))
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])


@dataclasses.dataclass(frozen=True)
class Standing:
    """A paper, the policies and mechanisms that name it, and the figures that test its claim.

    Attributes:
        simulated: contracts of the policies none of which a trainer, server or planner takes yet.
    """

    paper: Paper
    policies: tuple[Entry, ...]
    figures: tuple[Figure, ...]
    simulated: frozenset[str] = frozenset()

    @property
    def status(self) -> Status:
        """Derived from the policies and figures; the module's docstring says how."""
        if any(not figure.row.simulated for figure in self.figures):
            return Status.MEASURED
        if any(entry.contract not in self.simulated and not entry.simulated for entry in self.policies):
            return Status.IMPLEMENTED
        return Status.SIMULATED if self.policies or self.figures else Status.PLANNED

    @property
    def verdicts(self) -> str:
        """What the figures say of the claim; simulated ones apart, as ``confirmed; simulated: 2 contradicted``."""
        timed, simulated = (
            [figure.row.verdict for figure in self.figures if figure.row.simulated is kind] for kind in (False, True)
        )
        told = ([tally(timed)] if timed else []) + ([f"simulated: {tally(simulated)}"] if simulated else [])
        return "; ".join(told) or tally(())

    @property
    def findings(self) -> list[Finding]:
        """The figures, those together that differ in their setting alone."""
        groups: dict[tuple[str, ...], list[Figure]] = collections.defaultdict(list)
        for figure in self.figures:
            row, result = figure
            groups[result.name, result.device, row.subject, row.peer or "", row.metric].append(figure)
        return [Finding([row for row, _ in group], group[0].result) for group in groups.values()]

    @property
    def ours(self) -> list[str]:
        """The sentences of the policies' docstrings that say what is not the paper's own."""
        return self._sentences(OURS, without=NOT_BUILT)

    @property
    def not_built(self) -> list[str]:
        """What of the paper is missing: by contract, and as the policies' docstrings say."""
        by_contract = [f"No trainer or server takes a policy of {contract} yet." for contract in sorted(self.simulated)]
        alone = [entry for entry in self.policies if entry.simulated]
        by_policy = [f"No trainer or server takes {entry.contract} {entry.name!r} yet." for entry in alone]
        return by_contract + by_policy + self._sentences(NOT_BUILT)

    def _sentences(self, marked: re.Pattern[str], without: re.Pattern[str] | None = None) -> list[str]:
        found = (sentence for entry in self.policies for sentence in sentences(entry.docstring))
        chosen = (each for each in found if marked.search(each) and not (without and without.search(each)))
        # "Ours: the order." is shown under that word already.
        bare = (re.sub(r"^(?:Ours|Not built): (.)", lambda start: start[1].upper(), each) for each in chosen)
        return list(dict.fromkeys(bare))

    def describe(self, laws: Mapping[str, str]) -> dict[str, Any]:
        """The standing as plain data; ``laws`` gives each contract's law."""
        return {
            **self.paper.model_dump(),
            "status": str(self.status),
            "policies": [
                {
                    "contract": entry.contract,
                    "name": entry.name,
                    "path": shown_path(entry.path),
                    "law": laws.get(entry.contract, ""),
                }
                for entry in self.policies
            ],
            "ours": self.ours,
            "not_built": self.not_built,
            "evidence": [
                {
                    "bench": figure.result.name,
                    "device": figure.result.device,
                    "date": figure.result.date.isoformat(),
                    "verdict": figure.row.verdict,
                    **figure.row.model_dump(exclude={"papers"}, exclude_none=True),
                }
                for figure in self.figures
            ],
        }


def standings(papers: Iterable[Paper], index: Index, results: Iterable[Result]) -> list[Standing]:
    """Where each of ``papers`` stands, in the order of :class:`Status`, then by ``core`` and id."""
    results = list(results)
    simulated = {name for name, contract in index.contracts.items() if contract.simulated}
    found = []
    for paper in papers:
        declared = [*(entry for _, entry in sorted(index.policies.items())), *index.mechanisms]
        policies = tuple(entry for entry in declared if paper.id in entry.papers)
        figures = tuple(Figure(row, result) for result in results for row in result.rows_on(paper.id))
        found.append(Standing(paper, policies, figures, frozenset(simulated & {entry.contract for entry in policies})))
    order = list(Status)
    return sorted(found, key=lambda s: (order.index(s.status), -s.paper.core, s.paper.id))


def shown_path(path: Path) -> str:
    """``path`` as people know it: from the root of the source tree where it lies in it, else in full."""
    root = repository()
    return path.relative_to(root).as_posix() if root and path.is_relative_to(root) else str(path)
