"""The law of ``data.corpus``.

Bugs that its clauses are there to catch:

- texts: one that is lost, changed (its line ends, what is not ASCII) or taken from another field; an empty one.
- passes: a second pass that goes on where the first one ended, or comes in another order.
- names: two documents of one name, in two files or in two lines.
- streaming: documents that are all kept in memory, or read before the first is given.
- size: that of compressed data, or in units other than bytes, by which the time left is told.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from penstock.data.corpora.contract import Corpus
from penstock.testing.enrolled import rebuilt

#: Long and short, with line ends of both kinds, and some that are empty, also at a seam between files.
TEXTS = ("first text\n", "", "second\r\ntext", "ünïcödé 漢字 🙂", "", "", "a" * 3000, "again\n\n", "again\n\n", "last")


def check(corpus: Corpus, most: int | None = None) -> None:
    """Asserts the law of ``data.corpus`` on an example of the corpus's kind, which is written to a temporary folder; on
    the corpus itself, and ``most`` of its documents, where there can be none."""
    with tempfile.TemporaryDirectory() as folder:
        written = corpus.example(Path(folder), TEXTS)
        if written is None:
            check_documents(corpus, None, most)
        else:
            check_documents(written, [text for text in TEXTS if text])


def check_documents(corpus: Corpus, texts: list[str] | None, most: int | None = None) -> None:
    """The law for one corpus, which has these ``texts``, or nobody knows which; for ``most`` of the documents, the size
    aside, where there are more."""
    again = rebuilt(corpus)
    names, found, size = set(), [], 0
    pairs = itertools.zip_longest(corpus.documents(), again.documents())
    for number, (document, same) in enumerate(itertools.islice(pairs, most)):
        assert document == same, f"document {number} is another one in another pass"
        assert document.text, f"{document.name} is empty"
        assert document.name not in names, f"two documents are called {document.name}"
        names.add(document.name)
        size += len(document.text.encode())
        if texts is not None:
            found.append(document.text)
    assert names, "there is no document"
    assert texts is None or found == texts, f"the texts are {found!r}, and {texts!r} were written"
    check_streaming(corpus)
    told = corpus.size() if most is None or len(names) < most else None
    assert told is None or size / 3 < told < 3 * size + 1000, f"the size is {told} of {size} bytes"


def check_streaming(corpus: Corpus) -> None:
    """A document that was passed on is kept no longer, and a pass begins anew whatever others do."""
    passing = corpus.documents()
    assert isinstance(passing, Iterator), "documents are not streamed"
    first, *_ = kept = [weakref.ref(next(passing)) for _ in range(4)]
    gc.collect()
    assert first() is None, f"after {len(kept)} documents the first is still kept"
    assert next(corpus.documents()) == next(corpus.documents())
