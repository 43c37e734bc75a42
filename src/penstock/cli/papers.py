"""``penstock papers``: what works, from which paper, and what we measured beside what it claims."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from penstock.papers.catalogue import Standing


def papers(
    number: int | None = typer.Argument(None, metavar="ID", help="Show this paper alone, in full."),
    family: str | None = typer.Option(None, "--family", help="Only this family, for instance pipeline."),
    planned: bool = typer.Option(False, "--planned", help="Also the papers that nothing implements yet."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show the papers behind Penstock: those measured, then those implemented, then those simulated.

    Example: `penstock papers --family pipeline --planned`
    """
    from rich.console import Console

    from penstock.core.errors import UsageError
    from penstock.core.results import read_results, results_folder
    from penstock.papers.catalogue import Status, bibliography, standings
    from penstock.policy import index

    if number is not None and family is not None:
        raise UsageError("give an ID or --family, not both")
    library = bibliography()
    chosen = library.papers if number is None else (library.paper(number),)
    if family is not None:
        library.family(family)
        chosen = tuple(paper for paper in chosen if paper.family == family)
    found = standings(chosen, index(), read_results(results_folder()))
    laws = {contract.name: contract.law for contract in index().contracts.values()}
    if number is None and not planned:
        found = [standing for standing in found if standing.status is not Status.PLANNED]
    if as_json:
        described = [standing.describe(laws) for standing in found]
        typer.echo(json.dumps(described if number is None else described[0], indent=2, ensure_ascii=False))
    elif number is not None:
        Console().print(_sheet(found[0], library.families, laws))
    else:
        Console().print(_table(found, hidden=len(chosen) - len(found)))


def _table(found: Sequence[Standing], hidden: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    caption = f"{hidden} more are planned: --planned shows them" if hidden else f"{len(found)} papers"
    table = Table("ID", "Title", "Family", "Status", "Claim", "Policies", caption=caption)
    for standing in found:
        paper = standing.paper
        policies = "\n".join(f"{entry.contract}/{entry.name}" for entry in standing.policies)
        verdicts = standing.verdicts if standing.figures else ""
        table.add_row(str(paper.id), Text(paper.title), paper.family, str(standing.status), verdicts, Text(policies))
    return table


def _sheet(standing: Standing, families: Mapping[str, str], laws: Mapping[str, str]) -> RenderableType:
    """One paper in full: its claim, what tests it, where it is implemented, and what is ours or missing."""
    from rich.table import Table
    from rich.text import Text

    from penstock.papers.catalogue import shown_path
    from penstock.policy import MECHANISM

    paper = standing.paper
    sheet = Table.grid(padding=(0, 2))
    sheet.add_row("paper", Text(f"{paper.id}: {paper.title}", style="bold"))
    sheet.add_row("family", f"{paper.family} ({families[paper.family]})")
    sheet.add_row("status", str(standing.status))
    sheet.add_row("claimed", Text(paper.claim or "the abstract gives no figure"))
    for finding in standing.findings:
        row, result = finding.rows[0], finding.result
        wanted = f"{row.better} is better" if row.claim == "gain" else "no loss is claimed"
        compared = f"{row.subject}: {row.metric} {finding.ratio} that of {row.peer} ({finding.setting}); {wanted}"
        sheet.add_row(finding.verdicts, Text(f"{compared} [{result.name} on {result.device}, {result.date}]"))
    if not standing.figures:
        sheet.add_row("not tested", "no row of bench/results sets it beside its baseline")
    for entry in standing.policies:
        kind = MECHANISM if entry.contract == MECHANISM else "policy"
        sheet.add_row(kind, Text(f"{entry.contract}/{entry.name}  {shown_path(entry.path)}"))
    for contract in dict.fromkeys(entry.contract for entry in standing.policies if entry.contract != MECHANISM):
        sheet.add_row(f"law of {contract}", Text(laws.get(contract, "")))
    for name, notes in (("ours", standing.ours), ("not built", standing.not_built)):
        for note in notes:
            sheet.add_row(name, Text(note))
    if paper.code:
        sheet.add_row("authors' code", Text(paper.code))
    return sheet
