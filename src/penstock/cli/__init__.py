"""The command line: one file per verb.

A verb is a module of this package with a function of the same name, or, for a group of verbs, a ``typer.Typer`` called
``app``. Modules import the rest of Penstock inside their functions, so that ``penstock --help`` never waits for torch.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
import sys
from typing import Any

import typer

from penstock import __version__
from penstock.cli._help import Command
from penstock.core.errors import PenstockError


def build_app() -> typer.Typer:
    """The program with every verb found in this package."""
    app = typer.Typer(
        name="penstock",
        help="Train, serve and search large generative models.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_version)
    verbs = (module for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    for found in sorted(verbs, key=lambda module: module.name):
        module: Any = importlib.import_module(f"{__name__}.{found.name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=found.name)
        else:
            app.command(found.name, cls=Command)(getattr(module, found.name))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock {__version__}")
        raise typer.Exit


def _version(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Train, serve and search large generative models."""


def main() -> None:
    """Runs the program: errors for people go to standard error without a traceback, with exit code 1 or 2.

    Typer itself answers a malformed command line (exit code 2), Ctrl-C (130) and a reader of our output that has gone
    (1), all without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where it is not UTF-8, a sign that it lacks is a question mark
    try:
        build_app()(prog_name="penstock")
    except PenstockError as error:
        tell(error)
        sys.exit(error.exit_code)


def tell(error: PenstockError) -> None:
    """Prints an error for a person."""
    typer.secho(f"error: {error}", fg="red", err=True)
