"""The command lines that the documents print, as the shell would read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("penstock", "torchrun", "make", "curl", "grep")

_CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:penstock|torchrun) [^`]+)`")


class Command(NamedTuple):
    """A printed command: the document, and the words of the line."""

    document: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


def blocks() -> Iterator[Command]:
    """Those in console blocks, in the order of the documents."""
    for path in DOCUMENTS:
        for block in _CONSOLE.findall(path.read_text()):
            lines = iter(block.replace("\\\n", " ").splitlines())
            for line in lines:
                if line.startswith("$ "):
                    yield Command(path.name, _words(line[2:], lines))


def _words(line: str, following: Iterator[str]) -> list[str]:
    """Those of ``line``, and of the lines ``following`` it as long as a quotation is open."""
    try:
        return shlex.split(line)
    except ValueError:
        return _words(f"{line}\n{next(following)}", following)


def inline() -> Iterator[Command]:
    """Those in running text, and those of the help of ``penstock``'s verbs."""
    for path in [*DOCUMENTS, *sorted((ROOT / "src" / "penstock" / "cli").glob("*.py"))]:
        for text in _INLINE.findall(path.read_text()):
            yield Command(path.name, shlex.split(" ".join(text.split())))
