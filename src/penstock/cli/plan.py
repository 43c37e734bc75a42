"""``penstock plan``: what to set before a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from penstock.search.planners.contract import Choice
    from penstock.train.hyper.contract import Scale, Settings

app = typer.Typer(help="Plan a run before it starts.", no_args_is_help=True)


@app.command()
def hyper(
    parameters: float = typer.Option(..., "--parameters", help="Parameters of the model.", metavar="N"),
    tokens: float = typer.Option(..., "--tokens", help="Tokens that the run sees.", metavar="D"),
    batch: float | None = typer.Option(None, "--batch", help="Tokens for each update; by default the rule's choice."),
    length: int = typer.Option(512, "--length", help="Tokens of a sequence; batches are whole sequences."),
    policy: str = typer.Option("power_lines", "--policy", help="The rule, a policy of train.hyper."),
    overrides: list[str] = typer.Option([], "--set", help="An option of the rule, as key=value.", metavar="KEY=VALUE"),
    trials: Path | None = typer.Option(
        None,
        "--trials",
        metavar="RUNS.csv",
        help="Finished runs to fit the laws of power_lines to: parameters, tokens, batch, lr, weight_decay, loss.",
        show_default=False,
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Recommend batch, learning rate, weight decay and warm-up for a run of a given scale.

    Example: `penstock plan hyper --parameters 1e9 --tokens 2e10 --batch 5e5 --set lr=1e-3`
    """
    import json

    from penstock.core.config import apply_overrides, build
    from penstock.core.errors import UsageError
    from penstock.policy import create
    from penstock.train.hyper.contract import HyperRule, Scale

    asked = {"parameters": parameters, "tokens": tokens, "batch": batch, "length": length}
    scale = build(Scale, asked, "the scale of the run")
    options = apply_overrides({}, overrides)
    if "name" in options:
        raise UsageError("choose the rule with --policy, not with --set name=...")
    if trials is not None:
        options = {**_laws(policy, trials), **options}
    rule = create("train.hyper", policy, **options)
    assert isinstance(rule, HyperRule)
    settings = rule.settings(scale)
    if as_json:
        typer.echo(json.dumps(settings.model_dump(mode="json"), indent=2))
    else:
        _show(policy, scale, settings)


def _laws(policy: str, trials: Path) -> dict[str, Any]:
    """The laws of ``power_lines`` that finished runs show, as its options; says which those are."""
    from penstock.core.errors import UsageError
    from penstock.policy import lookup
    from penstock.train.hyper.fitting import fit_laws, read_trials
    from penstock.train.hyper.power_lines import PowerLines

    if not issubclass(lookup("train.hyper", policy), PowerLines):
        raise UsageError(f"--trials fits the laws of power_lines, and {policy} has none")
    laws = fit_laws(read_trials(trials))
    for name, law in laws.items():
        typer.echo(f"fitted {name}: {law.coefficient:.4g} x^{law.exponent:.4g}", err=True)
    return dict(laws)


@app.command()
def batch(
    model: str = typer.Argument(..., help="A model or run folder, a GGUF file, a boxed model or a hub name."),
    device: str = typer.Option("h100", "--device", help="a100, h100, h200 or b200."),
    length: int = typer.Option(1024, "--length", min=1, help="Tokens that a sequence holds on average."),
    width: int = typer.Option(2, "--bytes", min=1, max=8, help="Bytes of a weight and of a cached number."),
    slowest: float | None = typer.Option(None, "--tpot", help="Most milliseconds between two tokens of a sequence."),
    policy: str = typer.Option("knee", "--policy", help="The rule, a policy of plan.batch."),
    overrides: list[str] = typer.Option([], "--set", help="An option of the rule, as key=value.", metavar="KEY=VALUE"),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Recommend how many sequences to decode at a time, and the cache for them, from a roofline of the device.

    Example: `penstock plan batch python-6m --device h100 --length 1024`
    """
    import json

    from penstock.core.config import apply_overrides
    from penstock.core.errors import UsageError
    from penstock.models import hub
    from penstock.plan.batch.contract import BatchAdvisor
    from penstock.plan.decoding import DecodeCost
    from penstock.plan.hardware import named
    from penstock.policy import create

    options = apply_overrides({}, overrides)
    if "name" in options:
        raise UsageError("choose the rule with --policy, not with --set name=...")
    advisor = create("plan.batch", policy, **options)
    assert isinstance(advisor, BatchAdvisor)
    cost = DecodeCost.of(hub.read_config(hub.resolve(model)), named(device), length, width)
    advice = advisor.advise(cost, None if slowest is None else slowest / 1000)
    found = {
        "batch": advice.batch,
        "tokens_per_second": advice.throughput,
        "share_of_highest": advice.throughput / advice.ceiling,
        "tpot_ms": 1000 * advice.seconds,
        "weights_gib": cost.weights / 2**30,
        "cache_gib": advice.batch * cost.cache / 2**30,
        "cache_tokens": advice.batch * length,
        "largest_batch": cost.largest,
        "replicas": int(cost.usable // cost.bytes(advice.batch)),
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    _show_batch(f"{model} on {device}", found)


def _show_batch(title: str, found: dict[str, float]) -> None:
    """A table for the reader, then the engine's options."""
    from rich.console import Console
    from rich.table import Table

    table = Table("Advice", title)
    names = {
        "batch": "sequences at a time",
        "tokens_per_second": "tokens/s",
        "share_of_highest": "share of the highest tokens/s",
        "tpot_ms": "ms between tokens",
        "weights_gib": "weights (GiB)",
        "cache_gib": "cache (GiB)",
        "cache_tokens": "cache (tokens)",
        "largest_batch": "largest batch that fits",
        "replicas": "such replicas that fit",
    }
    for key, name in names.items():
        value = found[key]
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
    Console().print(table)
    typer.echo(f"\n# For the engine: --set sequences={found['batch']} --set cache_tokens={found['cache_tokens']}")


@app.command()
def search(
    runs: list[Path] = typer.Argument(
        ...,
        metavar="RUN...",
        help="Folders of penstock search --program coverage, one for each model and attention.",
    ),
    budget: float | None = typer.Option(
        None, "--budget", min=0, help="What a problem may cost; if not given, the best choice for any budget is shown."
    ),
    unit: str = typer.Option("eflops", "--unit", help="Of the budget: generated, tokens, flops or eflops."),
    right: float = typer.Option(1.0, "--right", help="A text is right where its score is this or more."),
    device: str = typer.Option("h100", "--device", help="a100, h100, h200 or b200."),
    width: int = typer.Option(2, "--bytes", min=1, max=8, help="Bytes of a weight and of a cached number."),
    policy: str = typer.Option("kinetics", "--policy", help="The rule, a policy of search.planner."),
    overrides: list[str] = typer.Option([], "--set", help="An option of the rule, as key=value.", metavar="KEY=VALUE"),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Recommend a model, its attention, a length and a number of texts for a search, by what models drew for problems
    of the kind.

    Example: `penstock plan search drawn-1m drawn-6m --budget 2e10`, where each folder is of
    `penstock search MODEL problems.jsonl --program coverage --option n=16 --scorer score.py --out FOLDER`
    """
    import dataclasses
    import json

    from penstock.core.config import apply_overrides, build
    from penstock.core.errors import UsageError
    from penstock.plan.hardware import named
    from penstock.policy import create
    from penstock.search.ledger import Budget
    from penstock.search.planners.contract import Planner
    from penstock.search.planners.drawn import candidates_of

    options = apply_overrides({}, overrides)
    if "name" in options:
        raise UsageError("choose the rule with --policy, not with --set name=...")
    asked = build(Budget, {"amount": budget, "unit": unit}, "the budget")
    planner = create("search.planner", policy, **options)
    assert isinstance(planner, Planner)
    candidates, hardware = candidates_of(runs, right), named(device)
    if asked.amount is None:
        found = planner.frontier(candidates, asked.unit, hardware, width)
    else:
        found = [planner.choose(candidates, asked.amount, asked.unit, hardware, width)]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(choice) for choice in found], indent=2))
        return
    _show_choices(found, asked.unit)


@app.command()
def tries(
    verified: Path = typer.Argument(
        ..., metavar="VERIFIED", help="A folder of penstock search --program coverage, whose scorer is the verifier."
    ),
    known: Path = typer.Argument(
        ..., metavar="KNOWN", help="One with the same texts, whose scorer knows what is right."
    ),
    cost: float = typer.Option(1.0, "--cost", min=0, help="Of a wrong answer, where a right one is worth 1."),
    price: float = typer.Option(0.0, "--price", min=0, help="Of a text that is drawn, likewise."),
    least: float = typer.Option(1.0, "--least", help="The verifier accepts a text with this score or more."),
    right: float = typer.Option(1.0, "--right", help="A text is right where its score in KNOWN is this or more."),
) -> None:
    """Recommend how often to try where a verifier that may be wrong accepts: how often what it accepts first is right,
    and the ceiling that no number of tries lifts.

    Example: `penstock plan tries verified known --cost 2 --price 0.01`, where both are of
    `penstock search MODEL problems.jsonl --program coverage --option n=16 --scorer SCORER --out FOLDER`
    """
    from rich.console import Console
    from rich.table import Table

    from penstock.search.coverage import best_tries, ceiling, settled
    from penstock.search.planners.drawn import accepted_of

    counts = accepted_of(verified, known, least, right)
    best, most = best_tries(counts, cost, price), min(samples for samples, _, _ in counts)
    table = Table("tries", "right", "wrong", "texts drawn", "worth")
    for number in sorted({1, best, most, *(2**power for power in range(most.bit_length()))} - {0}):
        good, bad, drawn = settled(counts, number)
        worth = good - cost * bad - price * drawn
        table.add_row(f"{number}", f"{good:.1%}", f"{bad:.1%}", f"{drawn:.4g}", f"{worth:.4g}")
    Console().print(table)
    typer.echo(f"\n# The ceiling: {ceiling(counts):.1%} are right with any number of tries")
    if best:
        typer.echo(f"# For the search: --program until_accepted --option tries={best} --option least={least:g}")
    else:
        typer.echo("# Not to answer is worth more than any number of tries")


@app.command()
def retrieval(
    runs: list[Path] = typer.Argument(
        ..., metavar="RUN...", help="Folders of penstock search --program retrieval, each with other options."
    ),
    budget: float = typer.Option(..., "--budget", min=0, help="Tokens that may be computed for a problem."),
    right: float = typer.Option(1.0, "--right", help="An answer is right where its score is this or more."),
) -> None:
    """Recommend how many documents, shots and rounds a budget of retrieval is spent on, by a model of accuracy that is
    fitted to runs on problems of the kind.

    Example: `penstock plan retrieval none documents shots rounds both --budget 2000`, where each folder is of
    `penstock search MODEL problems.jsonl --program retrieval --option documents=4 --scorer score.py --out FOLDER`
    """
    from rich.console import Console
    from rich.table import Table

    from penstock.core.errors import UsageError
    from penstock.search.allocation import combined, costs, fit, seen_in

    seen, unknown = seen_in(runs, right), (0.0, 0.0)  # of one task, what its documents tell is part of what they are
    cost, settings = costs(seen), combined(seen)
    try:
        model = fit([(each.setting, unknown, each.expected) for each in seen])
        best = model.best(settings, unknown, cost, budget)
    except ValueError as error:
        raise UsageError(f"nothing can be recommended: {error}") from error
    measured = {each.setting: f"{each.accuracy:.1%}" for each in seen}
    table = Table("documents", "shots", "rounds", "tokens", "predicted", "measured")
    for setting in sorted(settings, key=cost):
        predicted = f"{model.accuracy(setting, unknown):.1%}"
        table.add_row(*map(str, setting), f"{cost(setting):,.0f}", predicted, measured.get(setting, ""))
    Console().print(table)
    options = zip(("documents", "shots", "rounds"), best, strict=True)
    chosen = " ".join(f"--option {name}={value}" for name, value in options)
    typer.echo(f"\n# For the search: --program retrieval {chosen}")


#: Lines of a table of choices.
SHOWN = 16


def _show_choices(choices: list[Choice], unit: str) -> None:
    """A table for the reader, then options for the search; of many choices, some from the cheapest to the dearest."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    table = Table(f"{unit} a problem", "one is right", "model", "attention", "tokens at most", "texts")
    last = len(choices) - 1
    for place in sorted({round(last * step / (SHOWN - 1)) for step in range(SHOWN)}):
        choice = choices[place]
        read = "dense" if choice.sparse is None else f"block_topk {choice.sparse.budget:g}"
        row = (f"{choice.cost:,.4g}", f"{choice.accuracy:.1%}", choice.name, read, choice.length, choice.samples)
        table.add_row(*map(str, row))
    Console().print(table)
    if len(choices) == 1:
        (choice,) = choices
        given = (
            ""
            if choice.sparse is None
            else " --set kv.name=block_topk"
            + "".join(f" --set kv.{name}={value:g}" for name, value in dataclasses.asdict(choice.sparse).items())
        )
        typer.echo(
            f"\n# For the search: penstock search {choice.name} PROBLEMS.jsonl --option n={choice.samples} "
            f"--max-tokens {choice.length}{given}"
        )


def _show(policy: str, scale: Scale, settings: Settings) -> None:
    """A table for the reader, then lines for a configuration."""
    from rich.console import Console
    from rich.table import Table

    table = Table("Setting", policy)
    rows: dict[str, float] = {
        "batch (tokens)": settings.batch,
        "steps": settings.steps,
        "peak learning rate": settings.lr,
        "weight decay": settings.weight_decay,
        "warm-up (steps)": settings.schedule.warmup_steps,
        **{name.replace("_", " "): value for name, value in settings.findings.items()},
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
    Console().print(table)
    typer.echo("\n".join(["", "# For the run's configuration:", *_toml(scale, settings)]))


def _toml(scale: Scale, settings: Settings) -> list[str]:
    """The settings as lines of a training configuration."""
    sections: dict[str, dict[str, Any]] = {
        "batch": {"tokens": settings.batch, "stages": [{"length": scale.length}]},
        "optim": {"name": "adamw", "lr": settings.lr, "weight_decay": settings.weight_decay},
        "schedule": settings.schedule.describe(),
    }
    lines = [f"steps = {settings.steps}"]
    for section, values in sections.items():
        lines += ["", f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in values.items())]
    return lines


def _toml_value(value: Any) -> str:
    import json

    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
