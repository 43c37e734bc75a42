"""``penstock generate``: continues a prompt on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from penstock.cli._engine import ASKED, Asked, opens_engine

if TYPE_CHECKING:
    from penstock.serve.config import EngineConfig

#: Of an engine for one prompt, unless something else is said: graphs would take longer than they save.
ONE = {"sequences": 1, "compile": False}


@opens_engine
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
    engine: Asked = ASKED,
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
) -> None:
    """Continue a prompt, streaming to the terminal. An adapter that is given continues it.

    Examples: `penstock generate python-6m --prompt 'def fibonacci('`, `penstock generate file.gguf --prompt 'Once '`

    A model that is larger than memory, on a CPU: `penstock generate org/name --resident-weights 8GB -p 'Once '`

    With tokens that a smaller model drafts: `penstock generate python-6m --draft python-1m -p 'import os'`

    With a quarter of the cache, in 8-bit integers: `penstock generate smollm2 --kv snapkv --kv-budget 0.25 --kv-codec
    int8 --prompt-file long.txt`

    With a LoRA adapter: `penstock generate org/name --adapter sql=org/name-sql -p 'SELECT'`
    """
    import contextlib
    import sys

    from penstock.core.garbage import loading

    with loading():
        from penstock.core.config import build
        from penstock.core.devices import pick
        from penstock.core.errors import UsageError
        from penstock.core.files import read_text
        from penstock.core.progress import show
        from penstock.models import hub
        from penstock.serve.choose.sampling import SamplingParams
        from penstock.serve.messages import Request
        from penstock.serve.offline.stream import streamed
        from penstock.serve.opening import open_engine

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
    sampling = build(SamplingParams, options, "the sampling options")
    config = engine.config(ONE)
    if len(config.adapters) > 1:
        raise UsageError("a prompt is continued by one adapter", hint="Give --adapter once.")
    pick(device)
    if prompt_file is not None:
        text = read_text(prompt_file)
    else:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
    folder = hub.resolve(model)
    tokenizer = hub.load_tokenizer(folder)
    request = Request("prompt", tokenizer(text)["input_ids"], sampling, adapter=next(iter(config.adapters), ""))
    config = _no_larger(config, folder, len(request.prompt) + max_tokens)
    with contextlib.closing(open_engine(folder, config, device, show, tokenizer)) as opened:
        pieces = streamed(opened, tokenizer, request)
        typer.echo(text, nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    typer.echo()


def _no_larger(config: EngineConfig, folder: Path, tokens: int) -> EngineConfig:
    """``config`` with a cache for the model in ``folder`` and a text of so many ``tokens``, where it names no size."""
    from penstock.models import hub

    if config.cache_tokens is not None:
        return config
    context = min(config.context or tokens, hub.read_config(folder).context, tokens)
    # What is left of a cache that is compressed moves to other blocks.
    return config.model_copy(update={"cache_tokens": context * (2 if config.kv.compresses else 1)})
