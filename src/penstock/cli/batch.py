"""``penstock batch``: answers an OpenAI batch file."""

from __future__ import annotations

from pathlib import Path

import typer

from penstock.cli._engine import ASKED, Asked, opens_engine


@opens_engine
def batch(
    model: str = typer.Argument(..., help="A model or run folder, a GGUF file, a boxed model or a hub name."),
    source: Path = typer.Argument(..., metavar="IN.jsonl", help="Requests, one a line."),
    target: Path = typer.Argument(..., metavar="OUT.jsonl", help="Where responses are appended, one a line."),
    name: str | None = typer.Option(
        None, "--name", help="What the requests call the model; its own name if not given.", show_default=False
    ),
    window: int = typer.Option(4096, "--window", min=1, help="Most lines under way, and planned, at a time."),
    chat_template: Path | None = typer.Option(
        None, "--chat-template", metavar="FILE", help="A Jinja file that writes chats, in place of the model's own."
    ),
    dialogue: str | None = typer.Option(
        None, "--dialogue", metavar="FORMAT", help="How the model writes calls: {serve.dialogue}; else guessed."
    ),
    engine: Asked = ASKED,
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
) -> None:
    """Answer the requests of an OpenAI batch file. Run again, it goes on where it was stopped or killed.

    Example: `penstock batch python-6m in.jsonl out.jsonl`, where a line of the input is
    `{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "def add(", "max_tokens": 32}}`

    With tokens that are drafted and checked together, and a quarter of the cache:
    `penstock batch smollm2 in.jsonl out.jsonl --draft ngram --kv snapkv --kv-budget 0.25`
    """
    import contextlib

    from penstock.core.garbage import loading, settle

    with loading():
        from penstock.core.errors import UsageError
        from penstock.core.progress import show
        from penstock.models import hub
        from penstock.serve.chat import take_template
        from penstock.serve.dialogue.guess import named
        from penstock.serve.http.text import Tokens
        from penstock.serve.offline.batch_file import BatchRun
        from penstock.serve.offline.gather import Gatherer
        from penstock.serve.offline.vectors import LineVectors
        from penstock.serve.opening import open_engine

    called = name or hub.name_of(model)
    config = engine.config({"batching": "batchllm"}, called)
    for path, there in ((source, source.is_file()), (target.parent, target.parent.is_dir())):
        if not there:
            raise UsageError(f"there is no {path}")
    if target.exists() and source.samefile(target):
        raise UsageError(f"input and output are the same file, {source}")
    form = None if dialogue is None else named(dialogue)
    folder = hub.resolve(model)
    tokenizer = hub.load_tokenizer(folder)
    if chat_template is not None:
        take_template(tokenizer, chat_template)
    with contextlib.closing(open_engine(folder, config, device, show, tokenizer)) as opened:
        settle()
        tokens = Tokens(tokenizer, form, True)
        vectors = LineVectors(opened, folder, tokens, tokenizer)
        run = BatchRun(Gatherer(opened, tokenizer), tokens, called, window, vectors)
        summary = run.run(source, target, show)
    refused = f", of which {summary.refused:,} are refused" if summary.refused else ""
    earlier = f" ({summary.before:,} were there before)" if summary.before else ""
    typer.echo(f"answered {summary.done:,} lines{refused}{earlier}: {target}")
    if summary.refused:
        typer.echo(f"the first was refused because: {summary.reason}")
    if summary.stopped:
        typer.echo("stopped before the end; run the same command to go on")
        raise typer.Exit(130)
