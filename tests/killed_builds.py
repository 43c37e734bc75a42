"""Builds a token store in child processes that are killed at random instants. They are forked from this process."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tokenizers import Tokenizer

from children import born
from penstock.data.corpora.folder import Folder
from penstock.data.store import TokenStore


def kill(source: Path, tokenizer: Tokenizer, folder: Path, attempts: int) -> tuple[int, int]:
    """Builds in ``folder`` so many times, half of them over an older store; after each attempt there is a whole store
    or none. Returns how many builds were killed, and how many of those left none."""
    corpus = Folder(path=source)

    def build() -> None:
        TokenStore.build(corpus, tokenizer, folder)

    start = time.monotonic()
    os.waitpid(born(build), 0)
    usual = time.monotonic() - start
    whole = TokenStore.open(folder).manifest
    draw = random.Random(5)
    deaths = none = 0
    for attempt in range(attempts):
        if attempt % 2:
            folder.rename(folder.with_name(f"old-{attempt}"))
        child = born(build)
        time.sleep(draw.uniform(0, 1.2) * usual)
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        deaths += killed
        usual *= 1 if killed else 0.6  # the first one was slower, as machines are now and then
        if folder.exists():
            assert TokenStore.open(folder, verify=True).manifest == whole
        elif attempt % 2:
            none += 1
            folder.with_name(f"old-{attempt}").rename(folder)
        else:  # killed between the two renames: the older store lies beside, whole
            next(folder.parent.glob(".store.*.old")).rename(folder)
            TokenStore.open(folder, verify=True)
    return deaths, none
