"""``penstock eval``: measures what a model can do, and compares two models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from penstock.eval.records import Comparison
    from penstock.eval.run import Result

#: Questions with a common beginning are kept together.
BATCHING = {"batching": "batchllm"}


def eval(
    model: str | None = typer.Argument(None, help="A model folder, a run folder, a boxed model or a hub name."),
    tasks: str | None = typer.Option(None, "--tasks", metavar="A,B,...", help="Names of tasks; all if not given."),
    samples: int | None = typer.Option(None, "--samples", "-n", min=1, help="Questions of each task; 100 by default."),
    seed: int | None = typer.Option(None, "--seed", help="Of the questions."),
    options: list[str] = typer.Option(
        [],
        "--option",
        "-o",
        metavar="TASK.KEY=VALUE",
        help="Set an option of a task, such as arithmetic.digits=3. May be given again.",
    ),
    chat: bool = typer.Option(False, "--chat", help="Ask by the model's chat template."),
    harness: str | None = typer.Option(
        None,
        "--harness",
        metavar="A,B,...",
        help="Tasks of lm-eval instead, by name or as a YAML file; needs the extra lm-eval.",
    ),
    out: Path | None = typer.Option(
        None,
        "--out",
        metavar="FOLDER",
        help="Where results are written; run again, it goes on. evals/MODEL if not given, with a number behind where "
        "results are there.",
    ),
    compare: tuple[str, str] | None = typer.Option(
        None,
        "--compare",
        metavar="A B",
        help="Compare two results by paired tests; asks nothing. Folders, or models for the newest in evals/MODEL.",
    ),
    shown: bool = typer.Option(False, "--list", help="List the tasks and their options."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Set an engine option, such as sequences=64. May be given again."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
) -> None:
    """Measure what a model can do. Run again, it goes on where it was stopped or killed.

    Examples: `penstock eval python-6m --tasks code,arithmetic --samples 50`, and then
    `penstock eval --compare python-1m python-6m`
    """
    from penstock.core.errors import UsageError

    if shown:
        _list_tasks()
    elif compare is not None:
        _compare(*compare)
    elif model is None:
        raise UsageError(
            "say which model to evaluate",
            hint="For example: penstock eval python-6m. Or --compare two that are evaluated, or --list tasks.",
        )
    elif harness is not None:
        _harness(model, harness, samples, chat, out, overrides, device)
    else:
        given = {"samples": samples, "seed": seed}
        chosen = _tasks(tasks, {key: value for key, value in given.items() if value is not None}, options)
        _evaluate(model, chosen, chat, out, overrides, device)


def _list_tasks() -> None:
    from penstock.policy import index

    for entry in index().entries("eval.task"):
        typer.echo(f"{entry.name}: {entry.summary}")
        for name, field in entry.load().model_fields.items():
            typer.echo(f"    {name} = {field.get_default(call_default_factory=True)!r}")


def _tasks(names: str | None, given: dict[str, Any], options: Sequence[str]) -> list[dict[str, Any]]:
    """The tasks as tables."""
    from penstock.core.config import apply_overrides
    from penstock.core.errors import UsageError, nearest
    from penstock.policy import index

    wanted = index().names("eval.task") if names is None else [each.strip() for each in names.split(",")]
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"a task is named twice in --tasks {names}")
    tables = apply_overrides({name: {"name": name, **given} for name in wanted}, options)
    for name in tables:
        if name not in wanted:
            raise UsageError(f"--option sets something of {name!r}, which is not asked: {nearest(name, wanted)}")
    return list(tables.values())


def _evaluate(
    model: str, tables: Sequence[dict[str, Any]], chat: bool, out: Path | None, overrides: Sequence[str], device: str
) -> None:
    from penstock.core.config import apply_overrides
    from penstock.core.files import claim, explain_os_errors
    from penstock.core.progress import show
    from penstock.core.signals import StopRequest
    from penstock.eval.records import Record, free_folder, settings
    from penstock.eval.run import Evaluation, task_of
    from penstock.models import hub
    from penstock.search.llm import LLM
    from penstock.search.scorers.sandbox import told

    hub.resolve(model)
    evaluation = Evaluation([task_of(table) for table in tables], chat)
    out = out or free_folder(model, settings(model, evaluation, chat), len(evaluation))
    with explain_os_errors(f"cannot write {out}"):
        out.mkdir(parents=True, exist_ok=True)
    with claim(out):
        record = Record(out, model, evaluation, chat)
        done = record.outcomes
        if done:
            typer.echo(f"{len(done):,} samples were done before", err=True)
        stopped = False
        if len(done) < len(evaluation):
            for line in told(type(task) for task in evaluation.tasks):
                typer.echo(line, err=True)
            llm = LLM(model, device=device, **apply_overrides(BATCHING, overrides))
            with StopRequest() as stop, show("evaluating", len(evaluation), "sample") as bar:
                bar.advance(len(done))
                for place, outcome in evaluation.asked(llm, done, stop):
                    record.write(place, outcome)
                    bar.advance(1, evaluation.samples[place][0].policy_name)
                stopped = stop.wanted
        results = record.close()
    _print_results(results)
    typer.echo(f"results: {out / 'summary.json'}, samples: {out / 'results.jsonl'}")
    if stopped:
        typer.echo("stopped before the end; run the same command to go on")
        raise typer.Exit(130)


def _compare(*sources: str) -> None:
    from penstock.eval.records import compare, results_of

    first, second = map(results_of, sources)
    _print_comparisons(first, second, compare(first, second))


def _harness(
    model: str, tasks: str, samples: int | None, chat: bool, out: Path | None, overrides: Sequence[str], device: str
) -> None:
    from penstock.core.config import apply_overrides
    from penstock.core.files import write_json
    from penstock.eval.harness import harnessed
    from penstock.eval.records import free_folder
    from penstock.search.llm import LLM

    out = out or free_folder(model, {}, 0)

    def opened() -> LLM:
        return LLM(model, device=device, **apply_overrides(BATCHING, overrides))

    table, found = harnessed(opened, tasks.split(","), samples, chat=chat)
    write_json(out / "lm_eval.json", found)
    typer.echo(table)
    typer.echo(f"results: {out / 'lm_eval.json'}")


def _print_results(results: Sequence[Result]) -> None:
    from penstock.core.results import format_number

    rows = []
    for result in results:
        figure = result.estimate
        note = f"{result.failed} not judged: {result.reason}" if result.failed else ""
        between = f"{format_number(figure.low)} to {format_number(figure.high)}"
        metric = f"{result.metric} {'↑' if result.better == 'higher' else '↓'}"
        cells = (result.task, metric, format_number(figure.value), between, figure.method)
        rows.append((*cells, f"{len(result.outcomes):,}", note))
    _print_table(("task", "metric", "value", "95% interval", "by", "samples", ""), rows)


def _print_comparisons(first: Path, second: Path, found: Sequence[Comparison]) -> None:
    from penstock.core.results import format_number

    rows = []
    for each in found:
        apart = each.difference
        values = [format_number(result.estimate.value) for result in (each.first, each.second)]
        change = f"{apart.change.value:+.4g} ({apart.change.low:+.4g} to {apart.change.high:+.4g})"
        metric = f"{each.first.metric} {'↑' if each.first.better == 'higher' else '↓'}"
        rows.append((each.task, metric, *values, change, f"{apart.p:.3g}", apart.test))
    _print_table(("task", "metric", str(first), str(second), "change (95%, paired bootstrap)", "p", "by"), rows)


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
