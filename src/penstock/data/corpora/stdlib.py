"""The source of Python's own standard library: real code on every machine that has Python."""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from penstock.core.errors import DataError
from penstock.core.files import explain_os_errors
from penstock.data.corpora.contract import Corpus, Document
from penstock.policy import policy

INSTALLED = frozenset({"site-packages", "dist-packages", "__pycache__"})
TESTS = frozenset({"test", "tests", "idle_test"})


@policy("data.corpus", "stdlib")
class StandardLibrary(Corpus):
    """Every Python source file of the running interpreter's standard library, one document a file.

    About 12 MB, or 31 MB with ``tests``, the library's own test suites (CPython 3.11). Files are decoded as Python
    would decode them (byte order mark, coding line, universal newlines); those that Python could not read, which the
    test suites hold on purpose, are left out, and so is the build configuration that differs between machines.
    """

    tests: bool = False

    def documents(self) -> Iterator[Document]:
        root = library_root()
        for path in self._files(root):
            with explain_os_errors(f"cannot read {path}"):
                try:
                    with tokenize.open(path) as file:
                        text = file.read()
                except (SyntaxError, UnicodeDecodeError):
                    continue
            if text:
                yield Document(path.relative_to(root).as_posix(), text)

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._files(library_root()))

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> None:
        """There is one standard library, and nobody writes it."""

    def _files(self, root: Path) -> list[Path]:
        excluded = INSTALLED if self.tests else INSTALLED | TESTS
        return [
            path
            for path in sorted(root.rglob("*.py"))
            if not excluded.intersection(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
        ]


def library_root() -> Path:
    """The folder of the standard library.

    Raises:
        DataError: this Python keeps it elsewhere, such as in a zip archive.
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise DataError(
            f"this Python has no folder with its standard library (looked in {root})",
            hint="Use another corpus: a folder, a .jsonl file or a .parquet file.",
        )
    return root
