"""``penstock train``: trains a model from a configuration."""

from __future__ import annotations

from pathlib import Path

import typer


def train(
    config: Path | None = typer.Argument(None, help="The configuration, a TOML file.", show_default=False),
    preset: str | None = typer.Option(None, "--preset", help="A configuration that comes with Penstock, by name."),
    overrides: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Override a key, such as optim.lr=3e-4. May be given again."
    ),
    out: Path | None = typer.Option(
        None,
        "--out",
        "-o",
        metavar="RUN",
        help="The folder that the run fills; runs/train if not given.",
        show_default=False,
    ),
    resume: Path | None = typer.Option(None, "--resume", metavar="RUN", help="Continue the run in this folder."),
    branch: Path | None = typer.Option(
        None, "--branch", metavar="CHECKPOINT", help="Start a new run at a checkpoint of another one."
    ),
    show_config: bool = typer.Option(False, "--show-config", help="Print the complete configuration, and stop."),
) -> None:
    """Train a model: from a file, from a preset, or from where a run was stopped.

    Under `torchrun`, all processes train one model, each on its part of every batch. With parallel.shard=all each holds
    only some rows of every parameter, or, with parallel.shard=N, groups of N hold the model together. With
    parallel.tensor=T, T neighbours in the place of each process compute every layer together. With parallel.pipeline=P,
    P of them hold a part of the model each and work on it by pipeline.schedule, after pipeline.transforms, or along the
    paths of pipeline.route. Layers are cut evenly, or as pipeline.cuts, pipeline.speeds or pipeline.partition say.

    Examples: `penstock train --preset demo --set optim.lr=3e-3 --out runs/try`,
    `penstock train --preset sft --set start_from=smollm2 --set data.chats=chats.jsonl --out runs/sft`,
    `penstock train --preset sft --set data.chats=chats.jsonl --set tuner=lora --set optim.lr=2e-4 --out runs/lora`,
    `penstock train --preset dpo --set start_from=runs/sft --set data.preferences=pairs.jsonl --out runs/dpo`,
    `penstock train --preset kto --set start_from=runs/sft --set data.ratings=ratings.jsonl --out runs/kto`,
    `penstock train --preset reward --set start_from=runs/sft --set data.preferences=pairs.jsonl --out runs/reward`,
    `penstock train --preset distill --set data.chats=chats.jsonl --set objective.source=http://127.0.0.1:8000`,
    `penstock train --preset drafter-early-exit --set target=runs/try --out runs/exit`,
    `penstock train --preset acceptance --set target=python-6m --set draft=python-1m --out runs/acceptance`,
    `penstock train --resume runs/try`, `torchrun --nproc-per-node 8 -m penstock train config.toml`,
    `torchrun --nproc-per-node 8 -m penstock train config.toml --set parallel.shard=all`,
    `torchrun --nproc-per-node 8 -m penstock train config.toml --set parallel.shard=all --set parallel.tensor=2`,
    `torchrun --nproc-per-node 4 -m penstock train config.toml --set parallel.pipeline=4 --set pipeline.schedule=zb-h1`,
    `... --set parallel.pipeline=4 --set 'pipeline.transforms=[2bp, pipeoffload]'`,
    `... --set parallel.pipeline=4 --set pipeline.schedule=zb-h2 --set pipeline.post_validation=true`,
    `... --set parallel.pipeline=4 --set pipeline.schedule=pipedream --set clip=none`,
    `... --set parallel.pipeline=4 --set pipeline.route=checkfree`
    """
    from penstock.core.processor import share_cores

    share_cores()
    from penstock.cli import tell
    from penstock.core.config import apply_overrides, build, overridden, read_toml
    from penstock.core.errors import UsageError
    from penstock.core.progress import show, silent
    from penstock.parallel.world import World
    from penstock.train import presets
    from penstock.train.config import TrainConfig
    from penstock.train.run import Run
    from penstock.train.session import stoppable, train_to_the_end

    if sum(source is not None for source in (config, preset, resume, branch)) != 1:
        raise UsageError(
            "say what to train: one of a configuration file, --preset, --resume or --branch",
            hint=f"Presets: {', '.join(presets.names())}. Try: penstock train --preset demo",
        )
    if resume is not None and out is not None:
        raise UsageError("--out names the folder of a new run", hint="With --resume, leave it out.")
    if show_config and (resume is not None or branch is not None):
        raise UsageError("--show-config goes with a configuration file or --preset")
    changes = overrides or []
    path = config if preset is None else presets.path_of(preset)
    wanted = (
        None
        if path is None
        else build(TrainConfig, apply_overrides(read_toml(path), changes), overridden(str(path), changes))
    )
    if wanted is not None and show_config:
        typer.echo(wanted.model_dump_json(indent=2))
        return
    world = World.join()
    report = show if world.leads else silent
    folder = resume or out or Path("runs/train")
    with world.together(tell), stoppable(folder, world):
        if wanted is not None:
            work = Run.create(wanted, folder, world, report)
        elif branch is not None:
            work = Run.branch(branch, folder, world, changes, report)
        else:
            work = Run.reopen(folder, world, changes, report)
        for note in work.notes if world.leads else []:
            typer.secho(note, fg="yellow", err=True)
        train_to_the_end(work, report)
    world.end()
