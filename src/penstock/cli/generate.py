"""``penstock generate``: continues a prompt on the terminal."""

from __future__ import annotations

from pathlib import Path

import typer

from penstock.cli._weights import RESIDENT_WEIGHTS, chosen_weights


def generate(
    model: str = typer.Argument("python-6m", help="A model or run folder, a GGUF file, a boxed model or a hub name."),
    prompt: str | None = typer.Option(None, "--prompt", "-p", help="The text to continue (standard input: -)."),
    prompt_file: Path | None = typer.Option(None, "--prompt-file", help="A file with the text to continue."),
    max_tokens: int = typer.Option(200, "--max-tokens", "-n", help="How many tokens at most."),
    temperature: float = typer.Option(0.7, "--temperature", "-t", help="0 is greedy."),
    top_k: int | None = typer.Option(None, "--top-k", help="Draw from the k most probable tokens."),
    top_p: float = typer.Option(0.95, "--top-p", help="Draw from the tokens that make up this probability."),
    min_p: float = typer.Option(0.0, "--min-p", help="Least share of the most probable token's probability."),
    seed: int = typer.Option(0, "--seed", help="The same seed gives the same text."),
    resident_weights: str | None = RESIDENT_WEIGHTS,
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
) -> None:
    """Continue a prompt, streaming to the terminal.

    Examples: `penstock generate python-6m --prompt 'def fibonacci('`, `penstock generate file.gguf --prompt 'Once '`

    A model that is larger than memory, on a CPU: `penstock generate org/name --resident-weights 8GB -p 'Once '`
    """
    import sys

    from penstock.core.garbage import loading

    with loading():
        from penstock.core.config import build
        from penstock.core.devices import pick
        from penstock.core.errors import UsageError
        from penstock.core.files import read_text
        from penstock.models import hub
        from penstock.models.sampling import Sampling
        from penstock.models.text import stream_text
        from penstock.serve.build import loader
        from penstock.serve.config import EngineConfig

    if (prompt is None) == (prompt_file is None):
        raise UsageError("give the text to continue with --prompt or --prompt-file")
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    sampling = build(Sampling, options, "the sampling options")
    engine = build(EngineConfig, chosen_weights(resident_weights), "the engine's options")
    where = pick(device)
    if prompt_file is not None:
        text = read_text(prompt_file)
    else:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
    decoder = loader(engine, where)(hub.resolve(model)).eval()
    tokenizer = hub.load_tokenizer(model)
    pieces = stream_text(decoder, tokenizer, text, sampling, hub.end_tokens(model, tokenizer))
    typer.echo(text, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
