"""Writes the generated parts of the README and of the documents from the registry, the bibliography and the results.

A generated part stands between two lines, of which the first names the generator and, for most, its argument::

    <!-- figures: NAME -->      the results of a benchmark or of a peer, or of one device's file (NAME-DEVICE)
    <!-- comparisons: NAME -->  those of them that stand beside a peer's; NAME,METRIC is of one metric
    <!-- grid: NAME,METRIC -->  one metric of them: subjects and their peers down, settings across
    <!-- claims: NAME,CONTRACT --> its figures of the policies of a contract, beside what their papers claim
    <!-- points: FILE,X,Y -->   a picture of one device's file: a metric, the last, against one or more others
    <!-- shares: FILE,METRIC --> a picture of how far a metric is from the peer's, by the share of memory that is taken
    <!-- policies: CONTRACT --> the policies of a contract
    <!-- timelines -->          a picture of each pipeline schedule, which is drawn anew too
    <!-- timelines: A,B -->     one picture of some of them
    <!-- contracts -->          all contracts and their laws
    <!-- papers -->             the papers that something is built of: by area, a table and the details of each
    <!-- papers: planned -->    a list of the others, by area
    <!-- ratios: FILE -->       the claims of FILE (docs/front_page.toml), each with its ratios and its page
    <!-- bars: FILE -->         a picture of the same, which is drawn anew too
    <!-- text: FILE -->         a text file of the repository, as it is
    <!-- end -->

``python docs/generate.py`` rewrites what is stale; with ``--check`` it only names it, and exits with 1.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import itertools
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from penstock.core.config import Config, build, read_toml
from penstock.core.errors import PenstockError, UsageError, nearest
from penstock.core.files import read_text, write_atomic
from penstock.core.results import HEADINGS, Result, Row, cells, format_number, read_results
from penstock.papers.catalogue import Bibliography, Standing, Status, bibliography, standings
from penstock.policy import Entry, Index, create, index
from penstock.testing.house import ROWS, imports, row

BLOCK = re.compile(
    r"^<!-- (?P<name>[a-z]+)(?:: (?P<argument>\S+))? -->\n(?P<body>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL
)
PICTURE = re.compile(r"\]\(\S*images/((?:pipeline|bars|points|shares)/[^()\s]+|rooms)\.svg\)")
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
        results = read_results(root / "bench" / "results") + read_results(root / "bench" / "peers")
        return cls(root, index(), bibliography(), results)


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


@generator
def grid(sources: Sources, document: Path, wanted: str) -> str:
    """One metric of a benchmark's figures (hyphens for spaces), subjects down and settings across, for each device.
    What they were compared with has a line too, above them.

    Raises:
        UsageError: there are no results of that name, or none has the metric.
    """
    name, _, metric = wanted.partition(",")
    parts, known = [], set[str]()
    for result in named(sources, name):
        rows = [row for row in result.rows if row.metric.replace(" ", "-") == metric]
        known |= {row.metric.replace(" ", "-") for row in result.rows}
        if not rows:  # some are measured on one kind of device only
            continue
        beside = [(row.peer, row.setting, row.peer_value) for row in rows if row.peer and row.peer_value is not None]
        figures = [*beside, *((row.subject, row.setting, row.value) for row in rows)]
        unit = rows[0].unit
        values = {(who, setting): f"{format_number(value)} {unit}".strip() for who, setting, value in figures}
        settings = list(dict.fromkeys(row.setting for row in rows))
        own = {row.subject for row in rows}
        subjects = dict.fromkeys([*(who for who, _, _ in beside if who not in own), *(row.subject for row in rows)])
        lines = ((subject, *(values.get((subject, setting), "") for setting in settings)) for subject in subjects)
        parts.append(f"{table((rows[0].metric, *settings), lines)}\n{note(result)}")
    if not parts:
        raise UsageError(f"{name!r} has no metric {metric!r}: {nearest(metric, known)}")
    return "\n".join(parts)


@generator
def claims(sources: Sources, document: Path, wanted: str) -> str:
    """The figures of a benchmark whose subjects are policies of a contract, a line a subject, as far as several
    have them, and in the last column what the policy's papers claim. Subjects that are none have no claim."""
    name, _, contract = wanted.partition(",")
    return "\n".join(_claimed(sources, result, contract) for result in named(sources, name))


def _claimed(sources: Sources, result: Result, contract: str) -> str:
    """The table of :func:`claims` for one device."""
    shown = [each for each in result.rows if each.peer is None]
    several = collections.Counter((each.setting, each.metric) for each in shown)
    columns = [column for column, count in several.items() if count > 1]
    said = {(it.subject, it.setting, it.metric): f"{format_number(it.value)} {it.unit}".strip() for it in shown}
    lines = []
    for subject in dict.fromkeys(each.subject for each in shown):
        entry = sources.index.find(contract, subject)
        papers = [sources.bibliography.paper(number) for number in entry.papers] if entry is not None else []
        told = "; ".join(paper.claim for paper in papers if paper.claim)
        lines.append((subject, *(said.get((subject, *column), "") for column in columns), told))
    headings = (f"{metric}, {setting}" for setting, metric in columns)
    return f"{table(('Policy', *headings, 'Claim of its paper'), lines)}\n{note(result)}"


@generator
def points(sources: Sources, document: Path, wanted: str) -> str:
    """A picture of one metric of a device's file, the last, against each of the others."""
    folder = Path(os.path.relpath(sources.root / "docs", document.parent)) / "images" / "points"
    _, *others, y = wanted.split(",")
    label = f"{y} against {' and '.join(others)}".replace("-", " ")
    return f"![{label}]({(folder / wanted).as_posix()}.svg)\n"


@generator
def shares(sources: Sources, document: Path, wanted: str) -> str:
    """A picture of what a metric of a device's file loses beside a peer, by the share of the memory that is taken."""
    folder = Path(os.path.relpath(sources.root / "docs", document.parent)) / "images" / "shares"
    label = (
        f"What is added to the {wanted.partition(',')[2].replace('-', ' ')}, by the share of the memory that is taken"
    )
    return f"![{label}]({(folder / wanted).as_posix()}.svg)\n"


def named(sources: Sources, name: str) -> list[Result]:
    """The results of a benchmark, or of one device's file.

    Raises:
        UsageError: there are none of that name.
    """
    found = [r for r in sources.results if name in (r.name, f"{r.name}-{r.device}")]
    if not found:
        known = {r.name for r in sources.results} | {f"{r.name}-{r.device}" for r in sources.results}
        raise UsageError(f"bench/results has no figures called {name!r}: {nearest(name, known)}")
    return found


def note(result: Result) -> str:
    """What figures stand for: hardware, date, commit, versions, and where they come from if not from here."""
    dated = f"{result.date}, commit {result.commit}" if result.commit else f"{result.date}"
    used = ", ".join(f"{package} {version}" for package, version in result.versions.items())
    source = f"\n{wrapped(result.source)}" if result.source else ""
    return f"{'; '.join(filter(None, (result.hardware, dated, used)))}.\n{source}"


def tabulated(sources: Sources, name: str, shown: Callable[[Row], bool]) -> str:
    """The rows of a benchmark's results that are ``shown``, a table for each device that has some.

    Raises:
        UsageError: there are no results of that name, or none has such a row.
    """
    found = [(result, [cells(row) for row in result.rows if shown(row)]) for result in named(sources, name)]
    if not any(rows for _, rows in found):
        raise UsageError(f"no figure of {name!r} is of the kind that is to be shown")
    return "\n".join(f"{table(HEADINGS, rows)}\n{note(result)}" for result, rows in found if rows)


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


def pictures(sources: Sources, texts: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """The generated pictures that documents show: timelines, bars, points, shares, and the house."""
    for shown in sorted({found for text in texts for found in PICTURE.findall(text)}):
        path = sources.root / "docs" / "images" / f"{shown}.svg"
        folder, _, name = shown.rpartition("/")
        if folder == "pipeline":
            yield path, picture(name.split("-"))
        elif folder == "bars":
            yield path, drawn_bars(sources, f"docs/{name}.toml")
        elif folder == "points":
            yield path, drawn_points(sources, *name.split(","))
        elif folder == "shares":
            yield path, drawn_shares(sources, *name.split(","))
        else:
            yield path, drawn_house(sources)


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
    items = []
    for name, contract in sorted(sources.index.contracts.items()):
        known = ", ".join(f"`{policy}`" for policy in sources.index.names(name))
        taken = " Only simulated: no trainer or server takes them yet." if contract.simulated else ""
        items.append(wrapped(f"- `{name}`: {contract.law}. Policies: {known}.{taken}", "  "))
    return "".join(items)


@generator
def papers(sources: Sources, document: Path, which: str) -> str:
    """The papers by area: those that something is built of, a table and then each in detail; or the planned ones."""
    if which not in ("", "planned"):
        raise UsageError(f"there is no list of papers {which!r}: {nearest(which, ['planned'])}")
    planned = bool(which)
    parts = []
    found = standings(sources.bibliography.papers, sources.index, sources.results)
    for family, full_name in sorted(sources.bibliography.families.items(), key=lambda item: item[1]):
        own = [s for s in found if s.paper.family == family and (s.status is Status.PLANNED) == planned]
        if own:
            body = "".join(_item(s) for s in own) if planned else _area(own, document)
            parts.append(f"### {full_name}\n\n{body}")
    return "\n".join(parts) or "None yet.\n"


def _area(found: Sequence[Standing], document: Path) -> str:
    rows = ((f"[{s.paper.id}](#paper-{s.paper.id})", s.paper.title, str(s.status), s.verdicts) for s in found)
    details = (_details(standing, document) for standing in found)
    return "\n".join([table(("ID", "Paper", "Status", "The claim's direction"), rows), *details])


def _details(standing: Standing, document: Path) -> str:
    """A paper: its claim, what carries it, what is ours and what is missing, and the figures that test it."""
    paper = standing.paper
    code = f" ([the authors' code]({paper.code}))" if paper.code else ""
    parts = [f"#### Paper {paper.id}\n", wrapped(f"{paper.title}{code}: **{standing.status}**.")]
    parts.append(wrapped(f"*Claimed:* {(paper.claim or 'Nothing that could be checked').rstrip('.')}."))
    parts.append("".join(f"- {link(document, entry)}\n" for entry in standing.policies))
    for heading, notes in (("Ours", standing.ours), ("Not built", standing.not_built)):
        if notes:
            parts.append(wrapped(f"*{heading}:* {' '.join(map(unmarked, notes))}"))
    if standing.findings:
        rows = (
            (f.rows[0].subject, f.rows[0].peer or "", f.rows[0].metric, f.ratio, f.verdicts, f.setting, f.result.device)
            for f in standing.findings
        )
        parts.append(table(("Subject", "Baseline", "Metric", "Ratio", "Verdict", "Setting", "Device"), rows))
    return "\n".join(part for part in parts if part)


def _item(standing: Standing) -> str:
    paper = standing.paper
    title = f"[{paper.title}]({paper.code})" if paper.code else paper.title
    return wrapped(f"- {paper.id}: {title}" + (f": {paper.claim}" if paper.claim else ""), "  ")


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines of at most 120 characters, but for links, which no line breaks; ``indent`` is before all
    lines but the first."""
    lines = textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def unmarked(text: str) -> str:
    """A docstring's sentence in Markdown: roles and double backticks become code."""
    return re.sub(r"(?::\w+:)?`+~?\.*([^`]+)`+", r"`\1`", text)


class Bar(Config):
    """A row of the results that a claim rests on: its ``file``, and fields that no other row of it has."""

    label: str
    file: str
    subject: str | None = None
    setting: str | None = None
    metric: str | None = None
    peer: str | None = None

    def gain(self, sources: Sources) -> float:
        """How many times better than its peer the subject is: the row's ratio, or its inverse where less is better.

        Raises:
            UsageError: no row, or more than one, is meant.
        """
        wanted = self.model_dump(include={"subject", "setting", "metric", "peer"}, exclude_none=True)
        rows = [row for r in sources.results if f"{r.name}-{r.device}" == self.file for row in r.rows if row.ratio]
        found = [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]
        if len(found) != 1:
            raise UsageError(f"{len(found)} rows of {self.file!r} are meant by {self.label!r}, and one should be")
        ratio = found[0].ratio or 1.0
        return ratio if found[0].better == "higher" else 1 / ratio


class Claim(Config):
    """What was found beside one peer: the rows that show it, and the ``page`` that says more."""

    label: str
    beside: str
    page: str
    rows: tuple[Bar, ...]


class Claims(Config):
    """A file of claims."""

    claim: tuple[Claim, ...]

    @classmethod
    def read(cls, sources: Sources, name: str) -> Claims:
        """Those of the file ``name``, from the root of the repository."""
        return build(cls, read_toml(sources.root / name), source=name)


@generator
def ratios(sources: Sources, document: Path, name: str) -> str:
    """The claims of a file: what, beside whom, the range of the ratios, and the page with the figures."""
    rows = []
    for claim in Claims.read(sources, name).claim:
        gains = sorted(bar.gain(sources) for bar in claim.rows)
        ends = dict.fromkeys(f"{gain:.2f}×" for gain in (gains[0], gains[-1]))
        page, _, anchor = claim.page.partition("#")
        target = Path(os.path.relpath(sources.root / page, document.parent)).as_posix() + (
            f"#{anchor}" if anchor else ""
        )
        rows.append((f"[{claim.label}]({target})", claim.beside, " to ".join(ends)))
    return table(("", "Beside", "Ratio"), rows)


@generator
def bars(sources: Sources, document: Path, name: str) -> str:
    """A picture of the ratios of a file's claims."""
    folder = Path(os.path.relpath(sources.root / "docs", document.parent)) / "images" / "bars"
    target = (folder / Path(name).stem).as_posix()
    return f"![How many times faster Penstock was measured to be, and beside whom]({target}.svg)\n"


#: Pixels: of a picture, of a line of bars, of the labels left of the bars, and of the scale from 0.5 to 8.
WIDTH, LINE, LEFT, SCALE = 960, 22, 330, 560
LEAST, MOST = 0.5, 8.0


def place(ratio: float) -> float:
    """Where a ratio stands, on a scale on which twice is as far from 1 as half."""
    return LEFT + SCALE * math.log(ratio / LEAST) / math.log(MOST / LEAST)


def drawn_bars(sources: Sources, name: str) -> str:
    """The ratios of a file's claims as bars from 1 to the right, or to the left where Penstock is behind."""
    lines: list[str] = []
    top = 34
    for claim in Claims.read(sources, name).claim:
        lines.append(f'<text x="16" y="{top + 16}" font-weight="600">{escape(claim.label)}</text>')
        lines.append(
            f'<text x="{WIDTH - 16}" y="{top + 16}" text-anchor="end" fill="#666">{escape(claim.beside)}</text>'
        )
        top += LINE
        for bar in claim.rows:
            lines += _bar(bar.label, bar.gain(sources), top)
            top += LINE
        top += 8
    marks = []
    for ratio in (0.5, 1, 2, 4, 8):
        x = place(ratio)
        stroke = "#888" if ratio == 1 else "#e4e4e4"
        marks.append(f'<line x1="{x:.1f}" y1="28" x2="{x:.1f}" y2="{top}" stroke="{stroke}"/>')
        marks.append(f'<text x="{x:.1f}" y="20" text-anchor="middle" fill="#666">{ratio:g}×</text>')
    return _svg(WIDTH, top + 8, [*marks, *lines])


#: Colours of settings, and of subjects.
COLOURS = ("#2f7fc1", "#c9872f", "#3d9a50", "#9050a0", "#b0413e", "#4a8f8f", "#7a6a2f", "#666666")

#: What a setting says of the share of the memory that is taken.
SHARE = re.compile(r"(\d+)% (?:kept|of the bytes kept|on the device)")


def drawn_points(sources: Sources, name: str, *metrics: str) -> str:
    """The last of the ``metrics`` (hyphens for spaces) of one device's file against each of the others that the file
    has, one panel below the other.

    Raises:
        UsageError: it has none of them.
    """
    (result,) = named(sources, name)
    *others, y = metrics
    lines: list[str] = []
    top = 0.0
    for x in others:
        if any(row.metric.replace(" ", "-") == x for row in result.rows):
            drawn, height = _panel(result, x, y, top)
            lines += drawn
            top += height
    if not lines:
        raise UsageError(f"{name!r} has none of the metrics {', '.join(others)}")
    return _svg(WIDTH, top, lines)


def _panel(result: Result, x: str, y: str, above: float) -> tuple[list[str], float]:
    """A point for each subject and setting that has both metrics, with the subject's name, from ``above`` on; ``x`` on
    a scale of powers. Names keep clear of one another. The height with it."""
    rows = {(row.subject, row.setting, row.metric.replace(" ", "-")): row for row in result.rows}
    found = [
        (subject, setting, rows[subject, setting, x].value, row.value)
        for (subject, setting, metric), row in rows.items()
        if metric == y and (subject, setting, x) in rows and rows[subject, setting, x].value > 0
    ]
    settings = list(dict.fromkeys(setting for _, setting, _, _ in found))
    least, most = (bound([math.log2(each[2]) for each in found]) for bound in (min, max))
    top = max(each[3] for each in found) or 1.0
    left, width, height = 50, WIDTH - 220, 40 * LINE
    floor = above + 20 + height

    def at(across: float, up: float) -> tuple[float, float]:
        share = (math.log2(across) - least) / ((most - least) or 1.0)
        return left + share * width, floor - up / top * height

    lines = [f'<path d="M{left} {above + 10:g}V{floor:g}H{left + width + 160}" fill="none" stroke="#888"/>']
    for number in range(math.ceil(least), math.floor(most) + 1):
        place, _ = at(2.0**number, 0)
        said = f"{2.0**number:g}"
        lines.append(f'<text x="{place:.1f}" y="{floor + 18:g}" text-anchor="middle" fill="#666">{said}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, place = at(2.0**least, share * top)
        said = format_number(share * top)
        lines.append(f'<text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end" fill="#666">{said}</text>')
    for place, setting in enumerate(settings):
        lines.append(f'<circle cx="{left + 14}" cy="{floor + 38 + LINE * place:g}" r="4" fill="{COLOURS[place]}"/>')
        lines.append(f'<text x="{left + 26}" y="{floor + 42 + LINE * place:g}">{escape(setting)}</text>')
    lines += _labelled([(each[0], COLOURS[settings.index(each[1])], *at(each[2], each[3])) for each in found])
    units = [next(row.unit for row in rows.values() if row.metric.replace(" ", "-") == each) for each in (y, x)]
    label = " against ".join(f"{each.replace('-', ' ')} [{unit}]" for each, unit in zip((y, x), units, strict=True))
    lines.append(f'<text x="{left + width}" y="{floor + 42:g}" text-anchor="end" fill="#666">{escape(label)}</text>')
    return lines, 50 + 20 + height + LINE * len(settings)


def _added(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """How much more than the first peer's each subject's figures are, by the share of the memory that its setting names
    (``25% kept``, ``35% on the device``); what the setting says behind that belongs to the subject's name."""
    found = collections.defaultdict[str, dict[int, float]](dict)
    for each in rows:
        share, more = SHARE.search(each.setting), each.value - (each.peer_value or 0.0)
        if share is not None and each.peer == rows[0].peer and more > 0:
            found[each.subject + each.setting[share.end() :]][int(share[1])] = more
    return found


def drawn_shares(sources: Sources, name: str, metric: str) -> str:
    """What is added to a metric (hyphens for spaces, less is better) of one device's file beside the first peer, on a
    scale of powers, by the share of the memory that is taken: a line for each subject, named at its right end.

    Raises:
        UsageError: no row of the file has all that.
    """
    (result,) = named(sources, name)
    rows = [each for each in result.rows if each.metric.replace(" ", "-") == metric and each.peer is not None]
    added = _added(rows)
    if not added:
        raise UsageError(f"{name!r} has no {metric!r} beside a peer's in settings that name a share")
    floor, height, left, width = 20 + 18 * LINE, 18 * LINE, 70, WIDTH - 230
    powers = [math.log2(more) for values in added.values() for more in values.values()]
    least, most = math.floor(min(powers)), math.ceil(max(powers))

    def at(share: float, more: float) -> tuple[float, float]:
        return left + share / 100 * width, floor - (math.log2(more) - least) / (most - least) * height

    lines = [f'<path d="M{left} 20V{floor}H{left + width}" fill="none" stroke="#888"/>']
    for share in (0, 25, 50, 75, 100):
        x, _ = at(share, 2.0**least)
        lines.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle" fill="#666">{share}%</text>')
    for power in range(least, most + 1):
        _, y = at(0, 2.0**power)
        said = f"+{format_number(2.0**power)}"
        lines.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#666">{said}</text>')
    ends = []
    for (subject, values), colour in zip(added.items(), itertools.cycle(COLOURS)):
        spots = [at(share, more) for share, more in sorted(values.items())]
        lines.append(f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in spots)}" fill="none" stroke="{colour}"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in spots[:-1]]
        ends.append((subject, colour, *spots[-1]))
    lines += _labelled(ends)
    label = f"{rows[0].metric} beside {rows[0].peer} [{rows[0].unit}], by the share of its memory that is taken"
    lines.append(f'<text x="{left + width}" y="{floor + 42}" text-anchor="end" fill="#666">{escape(label)}</text>')
    return _svg(WIDTH, floor + 60, lines)


def _labelled(marks: Sequence[tuple[str, str, float, float]]) -> Iterator[str]:
    """Points (name, colour, x, y) with their names, each at the place beside or below its point that is free."""
    taken: list[tuple[float, float, float]] = []
    for name, colour, x, y in sorted(marks, key=lambda each: (each[3], each[2])):
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
        place, width = y + 4, 6.2 * len(name)
        while any(abs(place - other) < 11 and x < right and left < x + width for other, left, right in taken):
            place += 2
        taken.append((place, x, x + width + 8))
        yield f'<text x="{x + 7:.1f}" y="{place:.1f}" font-size="11" fill="{colour}">{escape(name)}</text>'


def _svg(width: int, height: float, lines: Iterable[str]) -> str:
    """A picture of this size with a white ground."""
    size = f'width="{width}" height="{height:g}"'
    opening = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" {size} '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect {size} fill="#fff"/>',
    ]
    return "\n".join([*opening, *lines, "</svg>"]) + "\n"


def _bar(label: str, gain: float, top: int) -> Iterator[str]:
    """A bar with its label on the left and its figure at its end."""
    start, end = sorted((place(1), place(gain)))
    colour = "#2f7fc1" if gain >= 1 else "#c9872f"
    yield f'<text x="{LEFT - 12}" y="{top + 16}" text-anchor="end">{escape(label)}</text>'
    yield f'<rect x="{start:.1f}" y="{top + 4}" width="{max(end - start, 1):.1f}" height="{LINE - 7}" fill="{colour}"/>'
    yield f'<text x="{max(end, place(1)) + 6:.1f}" y="{top + 16}">{gain:.2f}×</text>'


@dataclasses.dataclass(frozen=True)
class Package:
    """A row of the house: its name, the first paragraph of its docstring, and those of the rooms in it by name."""

    name: str
    says: str
    rooms: dict[str, str]


def packages_in(sources: Sources) -> list[Package]:
    """The rows of the house that are there, from top to bottom; ``__main__``, which only starts the last, left out."""
    source = sources.root / "src" / "penstock"
    found = []
    for name in ROWS:
        rooms = {
            ".".join(path.parent.relative_to(source / name).parts): _says(path)
            for path in sorted((source / name).rglob("*/__init__.py"))
        }
        path = source / name / "__init__.py" if (source / name).is_dir() else source / f"{name}.py"
        if path.exists() and name != "__main__":
            found.append(Package(name, _says(path), rooms))
    return found


def _says(path: Path) -> str:
    """The first paragraph of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(read_text(path))) or ""
    return unmarked(" ".join(text.partition("\n\n")[0].split())).rstrip(".")


@generator
def rooms(sources: Sources, document: Path, _: str) -> str:
    """A line for each package of the source, those within one below it, linked to its folder or file."""
    source = Path(os.path.relpath(sources.root / "src" / "penstock", document.parent)).as_posix()
    parts = []
    for package in packages_in(sources):
        inside = (sources.root / "src" / "penstock" / package.name).is_dir()
        path = f"{source}/{package.name}" if inside else f"{source}/{package.name}.py"
        parts.append(wrapped(f"- [`{package.name}`]({path}): {package.says}.", "  "))
        for name, says in package.rooms.items():
            parts.append(wrapped(f"  - [`{name}`]({path}/{name.replace('.', '/')}): {says}.", "    "))
    return "".join(parts)


@generator
def house(sources: Sources, document: Path, _: str) -> str:
    """A picture of the packages, and of who imports whom."""
    target = Path(os.path.relpath(sources.root / "docs" / "images" / "rooms.svg", document.parent)).as_posix()
    return f"![The packages from top to bottom, the rooms in each, and who imports whom]({target})\n"


#: Pixels of the picture of the house: the boxes' width, from where the names' column ends; a cell of the table of
#: imports; a character of a room's name; a line of text.
BOX, NAMES, CELL, LETTER, TEXT = 540, 96, 28, 6.7, 17


def drawn_house(sources: Sources) -> str:
    """A box for each row, the rooms in it, and a table of imports to the right: a column for each row, below its name,
    with a mark beside each row that imports it."""
    packages = packages_in(sources)
    source = sources.root / "src" / "penstock"
    pairs = {(row(one), row(other)) for one, other in imports(source)}
    lines, middles, top = [], [], 12.0
    for package in packages:
        drawn, height = _row(package, top)
        lines += drawn
        middles.append(top + height / 2)
        top += height + 6
    for place, package in enumerate(packages):
        x, middle = BOX + 36 + place * CELL, middles[place]
        lines.append(f'<text x="{x - 5}" y="{middle + 4:g}" font-weight="600">{package.name}</text>')
        users = [other for other in range(place + 1, len(packages)) if (packages[other].name, package.name) in pairs]
        if users:
            end = middles[users[-1]]
            lines.append(f'<line x1="{x}" y1="{middle + 9:g}" x2="{x}" y2="{end:g}" stroke="#c3d5e4"/>')
        for other in users:
            title = f"<title>{packages[other].name} imports {package.name}</title>"
            lines.append(f'<circle cx="{x}" cy="{middles[other]:g}" r="5" fill="#2f7fc1">{title}</circle>')
    return _svg(BOX + 36 + len(packages) * CELL + 60, top + 6, lines)


def _row(package: Package, top: float) -> tuple[list[str], float]:
    """The box of a row at ``top``, with what is in it, and its height."""
    lines, left = [], 8 + NAMES
    y = top + 21.0
    lines.append(f'<text x="18" y="{y:g}" font-weight="600">{package.name}</text>')
    for line in textwrap.wrap(package.says.replace("`", ""), 62):
        lines.append(f'<text x="{left}" y="{y:g}" fill="#666" font-size="12">{escape(line)}</text>')
        y += TEXT
    names = [name for name in package.rooms if "." not in name]
    x, y = float(left), y - 9 if names else y - TEXT
    for name in names:
        width = LETTER * len(name) + 14
        if x + width > BOX:
            x, y = float(left), y + 26
        lines.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="21" rx="4" fill="#dce9f5"/>')
        lines.append(f'<text x="{x + 7:g}" y="{y + 15:g}" font-family="monospace" font-size="11">{name}</text>')
        x += width + 6
    height = y + (29 if names else 11) - top
    box = f'<rect x="8" y="{top:g}" width="{BOX}" height="{height:g}" rx="6" fill="#f6f6f4" stroke="#d8d8d4"/>'
    return [box, *lines], height


@generator
def text(sources: Sources, document: Path, name: str) -> str:
    """The contents of a text file, named from the root of the repository."""
    return f"```text\n{read_text(sources.root / name).rstrip()}\n```\n"


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
    for path, after in itertools.chain(texts, pictures(sources, (text for _, text in texts))):
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
