"""``penstock data``: builds, shows and verifies token stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from penstock.data.corpora.contract import Corpus

app = typer.Typer(help="Build, show and verify token stores.", no_args_is_help=True)


@app.command()
def build(
    corpus: str = typer.Argument(
        help="A folder, a .txt, .jsonl, .ndjson, .json or .parquet file (.gz and .zst too), or a corpus by name."
    ),
    out: Path = typer.Option(..., "--out", help="The folder of the new store.", metavar="FOLDER"),
    vocabulary: int = typer.Option(4096, "--vocabulary", help="Tokens of the new tokenizer."),
    tokenizer: Path | None = typer.Option(
        None, "--tokenizer", help="Use the tokenizer.json in this folder instead of a new one.", metavar="FOLDER"
    ),
    begin_of_text: str = typer.Option(
        "auto", "--begin-of-text", help="The token before each document; auto: what the tokenizer puts there; '': none."
    ),
    end_of_text: str = typer.Option(
        "auto", "--end-of-text", help="The token after each document; auto: the tokenizer's own end of text."
    ),
    held_out: float = typer.Option(0.02, "--held-out", help="Share of documents kept from training."),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="Leave out what is damaged, and count it."),
    seed: int = typer.Option(0, "--seed", help="Of the order of the documents."),
    options: list[str] = typer.Option([], "--set", help="An option of the corpus.", metavar="KEY=VALUE"),
    replace: bool = typer.Option(False, "--replace", help="Replace the store that is in that folder."),
) -> None:
    """Train a tokenizer on a corpus and store the corpus as tokens.

    Examples: `penstock data build stdlib --out runs/store --set tests=true` and
    `penstock data build texts.jsonl --out runs/store --vocabulary 8192 --set field=body`
    """
    from penstock.core.errors import UsageError
    from penstock.core.progress import show as bar
    from penstock.data.building import training_texts
    from penstock.data.store import TokenStore
    from penstock.data.tokenizer import AUTO, END_OF_TEXT, declared, load_tokenizer, train_tokenizer

    if out.exists() and not replace:
        raise UsageError(f"{out} is there already", hint="Choose another folder, or add --replace.")
    source = _corpus(corpus, options)
    if tokenizer is None:
        chosen = train_tokenizer(training_texts(source, held_out, bar, skip_bad), vocabulary)
        end: str | None = END_OF_TEXT
    else:
        chosen, end = load_tokenizer(tokenizer), declared(tokenizer, "eos_token")
    if end_of_text != AUTO:
        end = end_of_text
    if end is None:
        raise UsageError(f"the tokenizer in {tokenizer} names no token that ends a text", hint="Give --end-of-text.")
    TokenStore.build(
        source,
        chosen,
        out,
        held_out=held_out,
        seed=seed,
        begin_of_text=begin_of_text,
        end_of_text=end,
        beside=tokenizer,
        vocabulary_asked=vocabulary if tokenizer is None else None,
        skip_bad=skip_bad,
        progress=bar,
    )
    show(out, names=5)


@app.command()
def show(
    folder: Path = typer.Argument(help="The folder of a store.", metavar="FOLDER"),
    names: int = typer.Option(5, "--names", help="How many document names of each split to list.", min=0),
) -> None:
    """Show what a token store holds.

    Example: `penstock data show runs/store --names 20`
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from penstock.core.progress import quantity
    from penstock.data.manifest import SPLITS
    from penstock.data.store import TokenStore

    store = TokenStore.open(folder)
    manifest = store.manifest
    options = ", ".join(f"{key}={value}" for key, value in manifest.corpus.items() if key != "name")
    console = Console()
    console.print(Text(f"{folder}: {manifest.corpus['name']} ({options}), by {manifest.written_by}"))
    console.print(Text(f"vocabulary {manifest.vocabulary}, tokenizer {manifest.tokenizer[:12]}, seed {manifest.seed}"))
    if manifest.left_out:
        console.print(Text(manifest.left_out))
    begin = manifest.begin_of_text or "nothing"
    console.print(Text(f"each document begins with {begin} and ends with {manifest.end_of_text}"))
    table = Table("Split", "Documents", "Tokens", "Text", "Bytes/token", "Such as")
    for name in SPLITS:
        split = store.split(name)
        density = f"{split.bytes / split.tokens:.3f}" if split.tokens else ""
        such_as = "\n".join(split.name(i) for i in range(min(names, split.documents)))
        size = quantity(split.bytes, "B")
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", size, density, Text(such_as))
    console.print(table)


@app.command()
def verify(folder: Path = typer.Argument(help="The folder of a store.", metavar="FOLDER")) -> None:
    """Read every byte of a token store and compare it with the checksums.

    Example: `penstock data verify runs/store`
    """
    from penstock.core.progress import show as bar
    from penstock.data.store import TokenStore

    store = TokenStore.open(folder)
    store.verify(progress=bar)
    typer.echo(f"{folder} is intact: {len(store.manifest.files)} files")


def _corpus(text: str, options: list[str]) -> Corpus:
    """The corpus called ``text``, or the one of the kind that the path ``text`` looks like."""
    from typing import cast

    from penstock.core.config import apply_overrides
    from penstock.core.errors import UsageError, nearest
    from penstock.data.corpora.contract import Corpus
    from penstock.data.corpora.files import plain_name
    from penstock.data.corpora.folder import kinds_by_suffix
    from penstock.policy import create, index

    contract = Corpus.contract_name
    given = apply_overrides({}, options)
    if index().find(contract, text):
        return cast(Corpus, create(contract, text, **given))
    path = Path(text)
    if not path.exists():
        raise UsageError(f"{text!r} is neither a path nor a corpus: {nearest(text, index().names(contract))}")
    if path.is_dir():
        return cast(Corpus, create(contract, "folder", path=path, **given))
    kinds = kinds_by_suffix()
    for suffix, kind in kinds.items():
        if plain_name(path).endswith(suffix):
            return cast(Corpus, create(contract, kind, path=path, **given))
    raise UsageError(
        f"cannot tell what kind of corpus {text} is; known: {', '.join(kinds)}",
        hint="A text of another name: penstock data build text --set path=FILE.",
    )
