"""Writes the generated parts of the README and of the documents from the registry, the bibliography and the results.

A generated part stands between two lines, of which the first names the generator and, for most, its argument::

    <!-- figures: NAME -->      the results of a benchmark, or of one device's file (NAME-DEVICE)
    <!-- comparisons: NAME -->  those of them that stand beside a peer's; NAME,METRIC is of one metric
    <!-- policies: CONTRACT --> the policies of a contract
    <!-- timelines -->          a picture of each pipeline schedule, which is drawn anew too
    <!-- timelines: A,B -->     one picture of some of them
    <!-- contracts -->          all contracts and their laws
    <!-- papers: STATUS -->     the papers that are measured, implemented or planned
    <!-- text: FILE -->         a text file of the repository, as it is
    <!-- end -->

``python docs/generate.py`` rewrites what is stale; with ``--check`` it only names it, and exits with 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from penstock.core.errors import PenstockError, UsageError, nearest
from penstock.core.files import read_text, write_atomic
from penstock.core.results import HEADINGS, Result, Row, cells, read_results
from penstock.papers.catalogue import Bibliography, Standing, Status, bibliography, standings
from penstock.policy import Entry, Index, create, index

BLOCK = re.compile(
    r"^<!-- (?P<name>[a-z]+)(?:: (?P<argument>\S+))? -->\n(?P<body>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL
)
PICTURE = re.compile(r"\]\(\S*images/pipeline/([^()\s]+)\.svg\)")
MARKER = re.compile(r"^<!-- (?:[a-z]+(?:: \S+)?|end) -->$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Sources:
    """What the generated parts are made from."""

    root: Path
    index: Index
    bibliography: Bibliography
    results: Sequence[Result]

    @classmethod
    def of(cls, root: Path) -> Sources:
        """Those of the source tree at ``root``."""
        return cls(root, index(), bibliography(), read_results(root / "bench" / "results"))


Generator = Callable[[Sources, Path, str], str]
GENERATORS: dict[str, Generator] = {}


def generator(function: Generator) -> Generator:
    """Registers a generator under its function's name. It gets the sources, the document and the marker's argument."""
    GENERATORS[function.__name__] = function
    return function


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (headings, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def link(document: Path, entry: Entry) -> str:
    """A policy's full name, linked to its file from ``document``."""
    target = Path(os.path.relpath(entry.path, document.parent)).as_posix()
    return f"[`{entry.contract}/{entry.name}`]({target})"


@generator
def figures(sources: Sources, document: Path, name: str) -> str:
    """The figures of a benchmark, a table for each device that it ran on."""
    return tabulated(sources, name, lambda row: True)


@generator
def comparisons(sources: Sources, document: Path, wanted: str) -> str:
    """Those of a benchmark's figures that stand beside a peer's, or of one metric of them (hyphens for spaces)."""
    name, _, metric = wanted.partition(",")
    return tabulated(sources, name, lambda row: row.peer is not None and metric in ("", row.metric.replace(" ", "-")))


def tabulated(sources: Sources, name: str, shown: Callable[[Row], bool]) -> str:
    """The rows of a benchmark's results that are ``shown``, a table for each device.

    Raises:
        UsageError: there are no results of that name.
    """
    found = [r for r in sources.results if name in (r.name, f"{r.name}-{r.device}")]
    if not found:
        known = {r.name for r in sources.results} | {f"{r.name}-{r.device}" for r in sources.results}
        raise UsageError(f"bench/results has no figures called {name!r}: {nearest(name, known)}")
    parts = []
    for result in found:
        used = ", ".join(f"{package} {version}" for package, version in result.versions.items())
        note = f"{result.hardware}; {result.date}, commit {result.commit}; {used}."
        parts.append(f"{table(HEADINGS, (cells(row) for row in result.rows if shown(row)))}\n{note}\n")
    return "\n".join(parts)


@generator
def policies(sources: Sources, document: Path, contract: str) -> str:
    """The policies of a contract, with what each does and the papers that it names."""
    if contract not in sources.index.contracts:
        raise UsageError(f"there is no contract {contract!r}: {nearest(contract, sources.index.contracts)}")
    rows = (
        (link(document, entry), entry.summary, "; ".join(sources.bibliography.paper(n).title for n in entry.papers))
        for entry in sources.index.entries(contract)
    )
    return table(("Policy", "What it does", "Papers"), rows)


@generator
def timelines(sources: Sources, document: Path, names: str) -> str:
    """The timeline of each pipeline schedule under its name, or one picture of some ``names``."""
    known = sources.index.names("pipeline.schedule")
    folder = Path(os.path.relpath(sources.root / "docs", document.parent)) / "images" / "pipeline"
    if names:
        for name in set(names.split(",")).difference(known):
            raise UsageError(f"there is no schedule {name!r}: {nearest(name, known)}")
        target = folder / f"{names.replace(',', '-')}.svg"
        return f"![Timelines of {' and '.join(names.split(','))}]({target.as_posix()})\n"
    return "\n".join(
        f"**{entry.name}**: {entry.summary}\n\n![Timeline of {entry.name}]({(folder / entry.name).as_posix()}.svg)\n"
        for entry in sources.index.entries("pipeline.schedule")
    )


def pictures(root: Path, texts: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """The timelines that documents show."""
    for names in sorted({names for text in texts for names in PICTURE.findall(text)}):
        yield root / "docs" / "images" / "pipeline" / f"{names}.svg", picture(names.split("-"))


def picture(names: Sequence[str]) -> str:
    """The timelines of some pipeline schedules, with default options, on 4 devices with 8 microbatches."""
    from penstock.pipeline.draw.svg import svg
    from penstock.pipeline.simulate.simulator import simulate
    from penstock.pipeline.simulate.times import Times

    schedules = [create("pipeline.schedule", name).build(devices=4, microbatches=8) for name in names]
    runs = [simulate(schedule, Times().costs(schedule)) for schedule in schedules]
    titles = [
        f"{name}: time {run.makespan:g}, bubble {run.bubble_share:.0%}, {max(run.peak_bytes):g} activations at most"
        for name, run in zip(names, runs, strict=True)
    ]
    return svg(*runs, titles=titles if len(names) > 1 else ())


@generator
def contracts(sources: Sources, document: Path, _: str) -> str:
    """All contracts, their laws, and the names of their policies."""
    rows = (
        (f"`{name}`", contract.law, ", ".join(f"`{policy}`" for policy in sources.index.names(name)))
        for name, contract in sorted(sources.index.contracts.items())
    )
    return table(("Contract", "The law that every policy of it obeys", "Policies"), rows)


@generator
def papers(sources: Sources, document: Path, status: str) -> str:
    """The papers of one status, a table for each family."""
    if status not in list(Status):
        raise UsageError(f"there is no status {status!r}: {nearest(status, map(str, Status))}")
    found = [s for s in standings(sources.bibliography.papers, sources.index, sources.results) if s.status == status]
    if not found:
        return f"None is {status} yet.\n"
    parts = []
    for family, full_name in sorted(sources.bibliography.families.items(), key=lambda item: item[1]):
        rows = [_paper(s, document) for s in found if s.paper.family == family]
        if rows:
            headings = ("ID", "Paper", "Claimed", "Measured", "Policies")
            used = [column for column in range(len(headings)) if any(row[column] for row in rows)]
            lines = [[row[column] for column in used] for row in rows]
            parts.append(f"### {full_name} (`{family}`)\n\n{table([headings[column] for column in used], lines)}")
    return "\n".join(parts)


@generator
def text(sources: Sources, document: Path, name: str) -> str:
    """The contents of a text file, named from the root of the repository."""
    return f"```text\n{read_text(sources.root / name).rstrip()}\n```\n"


def _paper(standing: Standing, document: Path) -> tuple[str, ...]:
    paper = standing.paper
    title = f"[{paper.title}]({paper.code})" if paper.code else paper.title
    measured = (
        f"{' '.join(filter(None, cells(row)))} ({result.name}, {result.device})" for row, result in standing.figures
    )
    return (
        str(paper.id),
        title,
        paper.claim,
        "<br>".join(measured),
        "<br>".join(link(document, entry) for entry in standing.policies),
    )


def render(text: str, document: Path, sources: Sources) -> str:
    """``text`` of ``document`` with every generated part made anew.

    Raises:
        PenstockError: a marker is unknown or stands alone, or its argument is; the message names the document.
    """

    def fill(found: re.Match[str]) -> str:
        name, argument = found["name"], found["argument"] or ""
        if name not in GENERATORS:
            raise UsageError(f"there is no generator {name!r}: {nearest(name, GENERATORS)}")
        opening = found[0].partition("\n")[0]
        if MARKER.search(found["body"]):
            raise UsageError(f"the marker {opening!r} has no end of its own")
        return f"{opening}\n\n{GENERATORS[name](sources, document, argument)}\n<!-- end -->"

    try:
        if stray := MARKER.search(BLOCK.sub("", text)):
            raise UsageError(f"the marker {stray[0]!r} has no partner")
        return BLOCK.sub(fill, text)
    except PenstockError as error:
        raise type(error)(f"{document.relative_to(sources.root)}: {error.what}", hint=error.hint) from error


def main(arguments: Sequence[str] | None = None, root: Path = Path(__file__).parents[1]) -> int:
    """Rewrites, or with ``--check`` names, documents with stale parts and stale pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated parts of the README and the documents.")
    parser.add_argument("--check", action="store_true", help="name what is stale, change nothing, exit with 1")
    check = parser.parse_args(arguments).check
    sources = Sources.of(root)
    stale = 0
    documents = (root / "README.md", *sorted((root / "docs").glob("*.md")))
    texts = [(document, render(document.read_text(encoding="utf-8"), document, sources)) for document in documents]
    for path, after in itertools.chain(texts, pictures(root, (text for _, text in texts))):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if after != before:
            stale += 1
            print(f"{path.relative_to(root)} is stale" if check else f"wrote {path}")
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, after)
    if check and stale:
        print(
            "These documents list the policies, the laws of their contracts, the papers and the results, and one of "
            "those is new or has changed. Run 'make docs', and commit what it writes."
        )
    return 1 if check and stale else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PenstockError as error:
        sys.exit(f"error: {error}")
