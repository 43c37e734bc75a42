"""The token store of a run: the one that is there, held against the configuration, or a new one.

What the ``[data]`` section leaves open is decided when a store is built, and read from the manifest where there is one.
So a run's record says what was read, and a configuration that asks for something else is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from penstock.core.errors import ConfigError, DataError, PenstockError, UsageError
from penstock.core.progress import Reporter
from penstock.data.building import training_texts
from penstock.data.corpora.contract import Corpus
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.data.manifest import Manifest
from penstock.data.store import TokenStore
from penstock.data.tokenizer import (
    AUTO,
    END_OF_TEXT,
    Around,
    beginning,
    declared,
    load_tokenizer,
    size_of,
    train_tokenizer,
)
from penstock.models import hub
from penstock.policy import create
from penstock.train.config import HELD_OUT, VOCABULARY, DataConfig

#: What a new store is built from where the configuration leaves it open.
CORPUS: Corpus = StandardLibrary()


def check_tokenizer(data: DataConfig, parent: str | Path, vocabulary: int) -> None:
    """Whether the tokenizer of the model ``parent`` can make a store for a model with so many embeddings.

    Raises:
        ConfigError: it has more tokens than the model, or another number than the configuration says.
        UsageError: it lacks a token that the configuration names.
        DataError: it is missing, or has no token that ends a text.
    """
    tokenizer, _ = _of_model(data, parent)
    size = size_of(tokenizer)
    if size > vocabulary:
        raise ConfigError(f"the tokenizer of {parent} has {size} tokens, the model only {vocabulary}")
    if data.vocabulary not in (None, size):
        raise ConfigError(
            f"data.vocabulary is {data.vocabulary}, and the tokenizer of {parent} has {size} tokens",
            hint="Leave data.vocabulary out: the model's own tokenizer is used.",
        )


def build(data: DataConfig, folder: Path, parent: str | Path | None, vocabulary: int, report: Reporter) -> None:
    """Builds the store at ``folder``, with the tokenizer of the model ``parent``, or with a new one for a model with
    ``vocabulary`` embeddings.

    Raises:
        PenstockError: the corpus is empty or damaged, or cannot be stored.
    """
    corpus = data.corpus or CORPUS
    held_out = HELD_OUT if data.held_out is None else data.held_out
    asked, beside = None, None
    if parent is None:
        asked = data.vocabulary or min(VOCABULARY, vocabulary)
        tokenizer = train_tokenizer(training_texts(corpus, held_out, report, data.skip_bad), asked)
        around = Around.of(tokenizer, data.begin_of_text, END_OF_TEXT if data.end_of_text == AUTO else data.end_of_text)
    else:
        tokenizer, around = _of_model(data, parent)
        beside = hub.resolve(parent)
    TokenStore.build(
        corpus,
        tokenizer,
        folder,
        held_out=held_out,
        begin_of_text=around.begin_of_text if len(around.beginning) < 2 else AUTO,
        end_of_text=around.end_of_text,
        beside=beside,
        vocabulary_asked=asked,
        skip_bad=data.skip_bad,
        progress=report,
    )


def _of_model(data: DataConfig, parent: str | Path) -> tuple[Tokenizer, Around]:
    """The tokenizer of a model, and the tokens that go around a document."""
    folder = hub.resolve(parent)
    tokenizer = load_tokenizer(folder)
    end = declared(folder, "eos_token") if data.end_of_text == AUTO else data.end_of_text
    if end is None:
        raise DataError(
            f"the tokenizer of {parent} has no token that ends a text", hint="Name one with data.end_of_text."
        )
    return tokenizer, Around.of(tokenizer, data.begin_of_text, end)


def open_store(data: DataConfig, folder: Path, parent: str | Path | None) -> TokenStore:
    """The store at ``folder``, which must be what the configuration says, and made with the tokenizer of ``parent``.

    Raises:
        UsageError: there is none.
        ConfigError: it differs from the configuration; the message says in what.
        DataError: it is damaged, or was made with another tokenizer.
    """
    tokenizer = load_tokenizer(hub.resolve(parent)) if parent else None
    store = TokenStore.open(folder, tokenizer=tokenizer)
    differing = list(_differences(data, store.manifest))
    begins = store.manifest.begin_of_text_ids if tokenizer is None else beginning(tokenizer)
    if data.begin_of_text == AUTO and store.manifest.begin_of_text_ids != begins:
        wanted = "".join(str(store.tokenizer.id_to_token(token)) for token in begins)
        differing.append(
            f"its documents begin with {store.manifest.begin_of_text or 'nothing'}, "
            f"and the model's tokenizer begins a text with {wanted or 'nothing'}"
        )
    if differing:
        raise ConfigError(
            f"the token store {folder} is not the one that the configuration describes:\n  " + "\n  ".join(differing),
            hint="Leave these keys of [data] out to take the store as it is, set them as it says, "
            "or name another folder in data.store.",
        )
    return store


def _differences(data: DataConfig, manifest: Manifest) -> Iterator[str]:
    """What the configuration says of a store, and the manifest otherwise."""
    if data.corpus is not None and _comparable(data.corpus.describe()) != _comparable(manifest.corpus):
        yield f"data.corpus is {data.corpus.describe()}, and it was built from {manifest.corpus}"
    sizes = (None, manifest.vocabulary, manifest.vocabulary_asked)
    if data.vocabulary not in sizes:
        yield f"data.vocabulary is {data.vocabulary}, and it has {manifest.vocabulary} tokens"
    for key in ("held_out", "begin_of_text", "end_of_text"):
        wanted, there = getattr(data, key), getattr(manifest, key)
        if wanted not in (None, AUTO, there):
            yield f"data.{key} is {wanted!r}, and it was built with {there!r}"


def _comparable(corpus: Mapping[str, Any]) -> dict[str, Any]:
    """A corpus as plain data, its path wherever the process is at work."""
    plain = dict(corpus)
    if isinstance(plain.get("path"), str):
        plain["path"] = str(Path(plain["path"]).resolve())
    return plain


def settled(data: DataConfig, manifest: Manifest) -> DataConfig:
    """The configuration with what the store says where it left something open."""
    options = dict(manifest.corpus)
    corpus: Any = data.corpus
    if corpus is None:
        try:
            corpus = create(Corpus.contract_name, options.pop("name"), **options)
        except (PenstockError, UsageError):  # of a plug-in that is not there any more
            corpus = None
    return data.model_copy(
        update={
            "corpus": corpus,
            "vocabulary": data.vocabulary or manifest.vocabulary,
            "held_out": manifest.held_out,
            "begin_of_text": manifest.begin_of_text,
            "end_of_text": manifest.end_of_text,
        }
    )


#: The keys of [data] that describe a store.
DESCRIBING = ("corpus", "vocabulary", "held_out", "begin_of_text", "end_of_text")


def moved(stored: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A run's recorded configuration without what describes its store, where ``overrides`` name another store."""
    if not any(override.partition("=")[0].strip() == "data.store" for override in overrides):
        return dict(stored)
    return {**stored, "data": {key: value for key, value in stored["data"].items() if key not in DESCRIBING}}
