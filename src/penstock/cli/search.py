"""``penstock search``: spends a budget on each problem of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def search(
    model: str = typer.Argument(..., help="A model folder, a run folder, a boxed model or a hub name."),
    problems: Path = typer.Argument(..., metavar="PROBLEMS.jsonl", help="Problems, one a line, each with a prompt."),
    program: str = typer.Option("best_of_n", "--program", "-p", help="How the budget is spent: {search.program}."),
    options: list[str] = typer.Option(
        [],
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="Set an option of the program, such as n=16. May be given again.",
    ),
    scorer: str | None = typer.Option(
        None,
        "--scorer",
        help="What texts are worth: a scorer ({search.scorer}), or a Python file with score(problem, text). Code that "
        "unit_tests and files run is contained by bubblewrap where it works, else by less; the command says by what.",
    ),
    scorer_options: list[str] = typer.Option(
        [],
        "--scorer-option",
        metavar="KEY=VALUE",
        help="Set an option of the scorer, such as model=FOLDER of reward_model. May be given again.",
    ),
    models: list[str] = typer.Option(
        [],
        "--model",
        metavar="NAME=MODEL",
        help="A further model that the program asks by this name, such as strong=python-6m. May be given again.",
    ),
    budget: float | None = typer.Option(
        None, "--budget", min=0, help="What each problem may cost; no limit if not given."
    ),
    unit: str = typer.Option("generated", "--unit", help="Of the budget: generated, tokens, flops or eflops."),
    out: Path = typer.Option(..., "--out", metavar="FOLDER", help="Where results are written; run again, it goes on."),
    html: bool = typer.Option(False, "--html", help="Write OUT/trees.html too, which shows the explored trees."),
    max_tokens: int = typer.Option(256, "--max-tokens", "-n", help="The longest text, in tokens."),
    temperature: float = typer.Option(1.0, "--temperature", "-t", help="0 is greedy."),
    top_p: float = typer.Option(1.0, "--top-p", help="Draw from the tokens that make up this probability."),
    stop: list[str] = typer.Option(
        [], "--stop", help="A text that ends a solution; \\n is a line's end. May be given again."
    ),
    step: str = typer.Option("\\n\\n", "--step", help="What ends a step of a solution; \\n is a line's end."),
    answer: str | None = typer.Option(
        None,
        "--answer",
        metavar="REGEX",
        help="Reads the answer off a text; the last line, or \\boxed{}, if not given.",
    ),
    seed: int = typer.Option(0, "--seed", help="The same seed gives the same trees."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Set an engine option, such as sequences=64. May be given again."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
) -> None:
    """Search for answers: many texts for each problem, all in one batch. Run again, it goes on where it was stopped or
    killed.

    Example: `penstock search python-6m problems.jsonl --program beam --budget 2000 --scorer score.py --out found`,
    where a line of the problems is `{"id": "a", "prompt": "def add(a, b):", "tests": ["assert add(1, 2) == 3"]}`
    """
    import dataclasses

    from penstock.core.config import apply_overrides, build
    from penstock.core.errors import PenstockError
    from penstock.core.files import checksum, claim, write_atomic
    from penstock.core.progress import show
    from penstock.core.signals import StopRequest
    from penstock.search.answers import last_line, matching
    from penstock.search.ledger import Budget
    from penstock.search.llm import LLM, Plan, checking, program_of, ready, scoring_of
    from penstock.search.page import tree_page
    from penstock.search.problems import read_problems
    from penstock.search.runs import Results, summary
    from penstock.search.scorers.contract import Scorer
    from penstock.search.scorers.sandbox import told
    from penstock.serve.choose.sampling import SamplingParams

    chosen = {"name": program, **apply_overrides({}, options)}
    scored: dict[str, Any] | None = None
    if scorer is not None:
        given = {"name": "function", "path": scorer} if scorer.endswith(".py") else {"name": scorer}
        scored = apply_overrides(given, scorer_options)
    plan = Plan(
        program_of(chosen),
        {} if scored is None else {"": scoring_of(scored)},
        build(
            SamplingParams,
            {
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "stop": tuple(map(_unescaped, stop)),
                "seed": seed,
            },
            "the sampling options",
        ),
        build(Budget, {"amount": budget, "unit": unit}, "the budget"),
        _unescaped(step),
        last_line if answer is None else matching(answer),
    )
    engine = apply_overrides({}, overrides)
    further = dict(_named(each) for each in models)
    ready(plan, further)
    tables = read_problems(problems, checking(plan.program))
    out.mkdir(parents=True, exist_ok=True)
    with claim(out):
        settings = {
            "model": model,
            "problems": checksum(problems),
            "program": chosen,
            "scorer": scored,
            "scorer_file": checksum(Path(scorer)) if scorer is not None and scorer.endswith(".py") else None,
            "budget": plan.budget.model_dump(),
            "sampling": plan.sampling.model_dump(mode="json", exclude_defaults=True),
            "step": plan.step,
            "answer": answer,
            "models": further or None,
            "kv": engine.get("kv"),
        }
        results = Results(out, settings)
        left = [(place, table) for place, table in enumerate(tables) if place not in results.done]
        if len(left) < len(tables):
            typer.echo(f"{len(tables) - len(left):,} problems were done before", err=True)
        stopped = False
        if left:
            for line in told(type(each) for each in plan.scorers.values() if isinstance(each, Scorer)):
                typer.echo(line, err=True)
            llm = LLM(model, device=device, **engine)
            others = {name: LLM(each, device=device, **engine) for name, each in further.items()}
            plan = dataclasses.replace(plan, models=others)
            with StopRequest() as asked, show("searching", len(tables), "problem") as bar:
                bar.advance(len(results.done))
                generated = 0
                for place, result in llm.searched(plan, left, asked):
                    results.write(place, result.record())
                    generated += result.ledger.generated
                    bar.advance(1, f"{generated:,} tokens")
                stopped = asked.wanted
        results.close()
        records = [results.done[place] for place in sorted(results.done)]
        if html:
            write_atomic(out / "trees.html", tree_page(settings, records))
    for line in summary(records):
        typer.echo(line)
    typer.echo(f"results: {out / 'results.jsonl'}" + (f", trees: {out / 'trees.html'}" if html else ""))
    if stopped:
        typer.echo("stopped before the end; run the same command to go on")
        raise typer.Exit(130)
    if any(record["error"] for record in records):
        raise PenstockError("the program failed on some problems", hint="Their lines in results.jsonl say why.")
    scorings, failures = (sum(record["ledger"][name] for record in records) for name in ("scorings", "failures"))
    if scorings and failures == scorings:
        raise PenstockError("no text could be scored", hint="Look at --scorer, and what it needs of a problem.")


def _named(given: str) -> tuple[str, str]:
    """Name and model of NAME=MODEL.

    Raises:
        UsageError: it is not of that form.
    """
    from penstock.core.errors import UsageError

    name, _, model = given.partition("=")
    if not name or not model:
        raise UsageError(f"--model {given} names no model", hint="Write --model strong=python-6m.")
    return name, model


def _unescaped(text: str) -> str:
    """``text`` with the ends of lines and tabs that it writes as on a command line."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
