"""``penstock pipeline``: draw, compare, search and export pipeline schedules, and cut models into stages."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from penstock.pipeline.ir.schedule import Schedule
    from penstock.pipeline.partition.pipedream import Layer
    from penstock.pipeline.simulate.simulator import Simulation
    from penstock.pipeline.simulate.times import Times


class Precision(enum.StrEnum):
    """Of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


app = typer.Typer(
    help="Draw, compare, search and export pipeline schedules; cut models into stages.", no_args_is_help=True
)

STAGES = typer.Option(4, "--stages", help="p, the devices that the pipeline runs over.", metavar="P")
MICROBATCHES = typer.Option(8, "--microbatches", help="m, the microbatches of a step.", metavar="M")
CHUNKS = typer.Option(None, "--chunks", help="v, the stages on each device, where the schedule has a choice.")
OPTIONS = typer.Option([], "--set", help="Another option of the schedule, as key=value.", metavar="KEY=VALUE")
COST = typer.Option(
    "F=1,I=1,W=1,comm=0",
    "--cost",
    help="Times of F, I and W of a p-th of the model, of a transfer (comm), of its activation to the host's memory "
    "(host, by default 1), and of a product of the output layer on one device (output, by default 0); overlap, by "
    "default 1, is the time of an overlapped F and B as a share of what they take after each other.",
    metavar="COST",
)
TRANSFORMS = typer.Option(
    [],
    "--transform",
    help="A transform of the schedule, with options as in pipeoffload:share=0.5; several apply in turn.",
    metavar="NAME",
)
COSTS = typer.Option(
    None,
    "--costs",
    help="A JSON file of times in place of --cost: the pipeline.json of a run, or one with forward, input_grad and "
    "weight_grad, each a number or a list with one for each stage, and transfer.",
    metavar="FILE",
)


@app.command()
def show(
    name: str = typer.Argument(..., help="A schedule, a route, or a CSV file in PyTorch's format.", metavar="NAME"),
    stages: int = STAGES,
    microbatches: int = MICROBATCHES,
    chunks: int | None = CHUNKS,
    overrides: list[str] = OPTIONS,
    transforms: list[str] = TRANSFORMS,
    cost: str = COST,
    costs: Path | None = COSTS,
    html: Path | None = typer.Option(None, "--html", help="Write an interactive page.", metavar="FILE"),
    png: Path | None = typer.Option(None, "--png", help="Write a picture.", metavar="FILE"),
    trace: Path | None = typer.Option(None, "--trace", help="Write a trace for Perfetto.", metavar="FILE"),
    as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON instead of the timeline."),
) -> None:
    """Simulate a schedule and draw its timeline.

    Example: `penstock pipeline show zb_h1 --stages 4 --microbatches 8 --html zb_h1.html`
    """
    import json

    from rich.console import Console

    from penstock.core.files import write_atomic
    from penstock.pipeline.draw import figure, page, terminal
    from penstock.pipeline.draw.trace import trace_events
    from penstock.pipeline.simulate.simulator import simulate

    times = _times(cost, costs)
    schedule = _transformed(_schedule(name, stages, microbatches, chunks, overrides, times), transforms, times)
    simulation = simulate(schedule, times.costs(schedule))
    title = f"{' + '.join([name, *transforms])}: {schedule.devices} devices, {schedule.microbatches} microbatches"
    if html:
        write_atomic(html, page.page(simulation, title))
    if png:
        write_atomic(png, figure.png(simulation, title))
    if trace:
        write_atomic(trace, json.dumps(trace_events(simulation, title)))
    if as_json:
        typer.echo(json.dumps({"name": name, **simulation.summary()}, indent=2))
    else:
        console = Console()
        console.print(title, style="bold", highlight=False)
        console.print(terminal.timeline(simulation, console.width), end="")
        console.print(terminal.legend(simulation))
        console.print(_figures(simulation))


@app.command()
def compare(
    stages: int = STAGES,
    microbatches: int = MICROBATCHES,
    transforms: list[str] = TRANSFORMS,
    cost: str = COST,
    costs: Path | None = COSTS,
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Tabulate every registered schedule, with its default options: time, bubble, memory, traffic; or why it refuses.

    Example: `penstock pipeline compare --stages 8 --microbatches 16 --cost F=1,I=1,W=1,comm=0.1`
    """
    import json

    from rich.console import Console

    from penstock.core.errors import UsageError
    from penstock.pipeline.ir.refusal import RefusalError
    from penstock.pipeline.ir.schedule import WeightRule
    from penstock.pipeline.simulate.simulator import simulate
    from penstock.pipeline.simulate.times import StagesError
    from penstock.policy import index

    simulated: dict[str, Simulation] = {}
    refused: dict[str, UsageError] = {}
    times = _times(cost, costs)
    for name in index().names("pipeline.schedule"):
        try:
            schedule = _schedule(name, stages, microbatches, None, [], times)
            if schedule.weights is WeightRule.FLUSH:
                schedule = _transformed(schedule, transforms, times)
            simulated[name] = simulate(schedule, times.costs(schedule))
        except (RefusalError, StagesError) as error:
            refused[name] = error
    simulated = dict(sorted(simulated.items(), key=lambda item: item[1].makespan))
    if as_json:
        rows = [{"name": name, **simulation.summary()} for name, simulation in simulated.items()]
        rows += [{"name": name, "refused": str(refusal)} for name, refusal in refused.items()]
        typer.echo(json.dumps(rows, indent=2))
        return
    console = Console()
    title = f"{stages} devices, {microbatches} microbatches, {costs or cost}"
    console.print(_comparison(simulated, " + ".join([title, *transforms])))
    for name, refusal in refused.items():
        what = refusal.what if name in refusal.what else f"{name}: {refusal.what}"
        console.print(f"{what}. {refusal.hint}", highlight=False)


@app.command()
def search(
    memory: float = typer.Option(
        ..., "--memory", help="The most that a device may hold: activations of microbatches on a p-th of the model."
    ),
    stages: int = STAGES,
    microbatches: int = MICROBATCHES,
    cost: str = COST,
    costs: Path | None = COSTS,
    top: int = typer.Option(10, "--top", min=1, help="How many to show."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Find the fastest schedules under a memory limit, over all registered schedules, their options and transforms.

    Example: `penstock pipeline search --memory 3 --stages 8 --microbatches 32 --cost F=1,I=1.1,W=0.9,comm=0.05`
    """
    import json

    from rich.console import Console

    from penstock.core.progress import show as progress
    from penstock.pipeline.search import search as find

    found = find(stages, microbatches, _times(cost, costs), memory, progress)[:top]
    if as_json:
        rows = [{"name": candidate.label, **candidate.simulation.summary()} for candidate in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    simulated = {candidate.label: candidate.simulation for candidate in found}
    title = f"{stages} devices, {microbatches} microbatches, {costs or cost}, memory {memory:g}"
    Console().print(_comparison(simulated, title))


@app.command()
def export(
    name: str = typer.Argument(..., help="A schedule, or a CSV file to check.", metavar="NAME"),
    csv: Path = typer.Option(..., "--csv", help="The file to write; - prints it.", metavar="FILE"),
    stages: int = STAGES,
    microbatches: int = MICROBATCHES,
    chunks: int | None = CHUNKS,
    overrides: list[str] = OPTIONS,
    transforms: list[str] = TRANSFORMS,
    cost: str = COST,
    costs: Path | None = COSTS,
) -> None:
    """Write a schedule as CSV for the runtime of torch.distributed.pipelining, and so for torchtitan.

    Example: `penstock pipeline export interleaved_1f1b --stages 4 --microbatches 8 --csv schedule.csv`
    """
    from penstock.core.files import write_atomic
    from penstock.pipeline.ir.torch_csv import to_csv

    times = _times(cost, costs)
    schedule = _schedule(name, stages, microbatches, chunks, overrides, times)
    schedule = _transformed(schedule, transforms, times)
    text = to_csv(schedule)
    if schedule.replicas > 1:
        typer.echo(
            "PyTorch does not read what has several replicas of a stage, such as r1:2F0; Penstock does.", err=True
        )
    if csv == Path("-"):
        typer.echo(text, nl=False)
    else:
        write_atomic(csv, text)


@app.command()
def partition(
    model: str | None = typer.Argument(
        None, help="A run folder, or any other model; its shape counts.", metavar="RUN", show_default=False
    ),
    stages: int = STAGES,
    bandwidth: float | None = typer.Option(
        None, "--bandwidth", help="GB/s between two devices; 10, or what --costs measured.", min=1e-6
    ),
    straight: bool = typer.Option(False, "--straight", help="One device for each stage, as most schedules have it."),
    out: Path | None = typer.Option(
        None, "--out", help="Write a file that training takes as pipeline.partition.", metavar="FILE"
    ),
    costs: Path | None = typer.Option(
        None, "--costs", help="The pipeline.json of a run, in place of RUN: what its layers took there.", metavar="FILE"
    ),
    rows: int = typer.Option(1, "--rows", help="Sequences in a microbatch.", min=1),
    length: int = typer.Option(512, "--length", help="Tokens in a sequence.", min=1),
    dtype: Precision = typer.Option(Precision.fp32, "--dtype", help="Of weights and activations."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Profile the layers of a model, and cut it as PipeDream does: into stages, on one or more of the devices each.

    Examples: `penstock pipeline partition runs/first --stages 4 --bandwidth 25 --rows 4`,
    `penstock pipeline partition --costs runs/first/pipeline.json --stages 4 --straight --out partition.json`
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from penstock.core.errors import UsageError
    from penstock.core.files import write_json
    from penstock.pipeline.partition import pipedream
    from penstock.pipeline.partition.file import PartitionFile

    if (model is None) is (costs is None):
        raise UsageError(
            "say what to cut: a model, or --costs with the pipeline.json of a run",
            hint="For example: penstock pipeline partition runs/first --stages 4",
        )
    if costs is not None:
        from penstock.pipeline.run.layers import measured_layers

        layers, known = measured_layers(costs)
    else:
        layers, known = _profiled(str(model), rows, length, dtype, device), 10e9
    speed = known if bandwidth is None else 1e9 * bandwidth
    found = pipedream.partition(layers, stages, speed, 1 if straight else None)
    names = ["embedding", *(f"layer {number}" for number in range(len(layers) - 2)), "head"]
    described = PartitionFile(
        layers=dict(zip(names, layers, strict=True)), stages=found.stages, seconds=found.seconds
    ).model_dump(mode="json")
    if out is not None:
        write_json(out, described)
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    table = Table("Stage", "From", "To", "Devices", "Work", title=f"{stages} devices, {speed / 1e9:.3g} GB/s")
    for number, stage in enumerate(found.stages):
        work = sum(layer.seconds for layer in layers[stage.first : stage.last]) / stage.replicas
        table.add_row(
            str(number), names[stage.first], names[stage.last - 1], str(stage.replicas), f"{1e3 * work:.3g} ms"
        )
    console = Console()
    console.print(table)
    replicas = ",".join(str(stage.replicas) for stage in found.stages)
    console.print(
        f"A minibatch every {1e3 * found.seconds:.3g} ms. To see it run: "
        f"penstock pipeline show pipedream --stages {stages} --set 'replicas=[{replicas}]'",
        highlight=False,
    )
    if out is not None:
        console.print(f"To train so: penstock train CONFIG --set pipeline.partition={out}", highlight=False)


def _profiled(model: str, rows: int, length: int, dtype: Precision, device: str) -> list[Layer]:
    """The layers of a model on this machine."""
    import torch

    from penstock.core.devices import pick
    from penstock.core.progress import show as progress
    from penstock.models import hub
    from penstock.pipeline.run.layers import profile

    config = hub.read_config(hub.resolve(model))
    kind = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[dtype]
    return profile(config, rows, length, device=pick(device), dtype=kind, reporter=progress)


def _schedule(
    name: str, stages: int, microbatches: int, chunks: int | None, overrides: list[str], times: Times
) -> Schedule:
    """The schedule of a policy, of a route, or of a CSV file; ``times`` are for policies that plan by them."""
    from penstock.core.config import apply_overrides
    from penstock.core.errors import UsageError
    from penstock.core.files import read_text
    from penstock.pipeline.ir.torch_csv import from_csv
    from penstock.pipeline.routes.contract import PipelineRoute
    from penstock.pipeline.schedules.contract import PipelineSchedule
    from penstock.policy import create, index, lookup

    if name.endswith(".csv"):
        return from_csv(read_text(Path(name)), name)
    contract = "pipeline.route" if index().find("pipeline.route", name) else "pipeline.schedule"
    timed = "times" in lookup(contract, name).model_fields
    options = apply_overrides({"times": times.model_dump()} if timed else {}, overrides)
    if "name" in options:
        raise UsageError("choose the schedule by its name, not with --set name=...")
    if chunks is not None:
        options["chunks"] = chunks
    policy = create(contract, name, **options)
    assert isinstance(policy, PipelineSchedule | PipelineRoute)
    return policy.build(stages, microbatches)


def _transformed(schedule: Schedule, transforms: list[str], times: Times) -> Schedule:
    """The schedule after each of ``transforms``, written ``NAME`` or ``NAME:key=value,key=value``."""
    from penstock.core.config import apply_overrides
    from penstock.pipeline.transforms.contract import PipelineTransform
    from penstock.policy import create, lookup

    for text in transforms:
        name, _, options = text.partition(":")
        timed = "times" in lookup("pipeline.transform", name).model_fields
        given = apply_overrides({"times": times.model_dump()} if timed else {}, list(filter(None, options.split(","))))
        policy = create("pipeline.transform", name, **given)
        assert isinstance(policy, PipelineTransform)
        schedule = policy.apply(schedule)
    return schedule


def _times(text: str, file: Path | None) -> Times:
    """The times of a costs file, or those that ``--cost`` says over the defaults."""
    from penstock.core.config import build
    from penstock.core.errors import UsageError, nearest
    from penstock.core.files import read_json
    from penstock.pipeline.simulate.times import Times

    if file is not None:
        tree = read_json(file)
        measured = isinstance(tree, dict) and "times" in tree  # the profile of a run
        return build(Times, tree["times"] if measured else tree, source=str(file))
    fields = {
        "F": "forward",
        "I": "input_grad",
        "W": "weight_grad",
        "comm": "transfer",
        "host": "host",
        "output": "output",
        "overlap": "overlap",
    }
    values: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key.strip() not in fields:
            raise UsageError(f"--cost: there is no cost {key.strip()!r}: {nearest(key.strip(), fields)}")
        try:
            values[fields[key.strip()]] = float(value)
        except ValueError:
            raise UsageError(f"--cost: {part!r} is not of the form F=1.5") from None
    return build(Times, values, source="--cost")


def _figures(simulation: Simulation) -> str:
    peaks = simulation.peak_activations
    return (
        f"makespan {simulation.makespan:.6g}   longest span of a device {simulation.longest_span:.6g}   "
        f"bubble {simulation.bubble_share:.1%}   transfers {simulation.transfers:,}\n"
        f"most activations of a device {min(peaks)} to {max(peaks)}, each 1/{simulation.schedule.stages} of the model's"
    )


def _comparison(simulated: dict[str, Simulation], title: str) -> Table:
    from rich.table import Table

    from penstock.policy import index

    table = Table(
        "Schedule",
        *("Makespan", "Bubble", "Idle in span", "Peak memory", "Traffic"),
        title=title,
        caption="Idle in span: the most that a device idles between its first and its last task. Peak memory: of one "
        "device, in microbatches' activations on a p-th of the model. Traffic: messages, and gradients of replicas, in "
        "messages and p-ths of the model. pipedream is asynchronous: only the ends of a run idle.",
    )
    table.columns[0].overflow, table.columns[0].width = "fold", max(map(len, index().names("pipeline.schedule")))
    for column in table.columns[1:]:
        column.justify, column.min_width = "right", 7
    for name, simulation in simulated.items():
        table.add_row(
            name,
            f"{simulation.makespan:.6g}",
            f"{simulation.bubble_share:.1%}",
            f"{simulation.bubble_time:.4g}",
            f"{max(simulation.peak_bytes):.4g}",
            f"{simulation.traffic:,.6g}",
        )
    return table
