"""``penstock replay``: recorded steps of an engine, computed again."""

from __future__ import annotations

from pathlib import Path

import typer


def replay(
    recording: Path = typer.Argument(..., help="A file that `penstock serve --record FILE` wrote."),
    model: str | None = typer.Option(
        None, "--model", help="A model to compute them with; the recorded one if not given.", show_default=False
    ),
    random: bool = typer.Option(False, "--random", help="Use random weights of the recorded shape: for times alone."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
) -> None:
    """Compute the steps of an engine again: what came out, and how long it took.

    Examples: `penstock serve python-6m --record steps.bin`, then `penstock replay steps.bin`
    """
    from penstock.core.config import build
    from penstock.core.devices import pick
    from penstock.core.progress import show
    from penstock.models import hub
    from penstock.models.config import DecoderConfig
    from penstock.models.decoder import Decoder
    from penstock.serve.build import build_runner
    from penstock.serve.calibration import pieces_of_text
    from penstock.serve.config import EngineConfig
    from penstock.serve.opening import dtype_of
    from penstock.serve.run.record import read_header
    from penstock.serve.run.replay import replay as run

    header, where = read_header(recording), pick(device)
    config = build(EngineConfig, header["engine"], "the recorded engine's options")
    pieces = None
    if random:
        shape = build(DecoderConfig, header["model"], "the recorded model's shape")
        made = Decoder(shape).initialize(0).to(where, dtype_of(config, where)).eval()
    else:
        folder = hub.resolve(model or header["source"])
        made = hub.load(folder, device=where, dtype=dtype_of(config, where)).eval()
        pieces = pieces_of_text(hub.load_tokenizer(folder), config.codec, made.config.context)
    found = run(recording, build_runner(made, config, show, pieces), show)
    rate = found.tokens / found.seconds if found.seconds else 0.0
    typer.echo(f"{found.steps:,} steps of {found.tokens:,} tokens in {found.seconds:.2f} s: {rate:,.0f} tokens/s")
    if not random:
        typer.echo(f"{found.equal:,} of {found.chosen:,} chosen tokens are those of the recording.")
