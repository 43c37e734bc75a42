"""The parts of ``penstock demo`` that are not training: the comparison with xz, and the completions."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.core.errors import UsageError
from penstock.core.files import claim, explain_os_errors, sweep, write_json
from penstock.data.store import Split
from penstock.models import hub
from penstock.models.sampling import Sampling
from penstock.models.text import stream_text
from penstock.train.evaluate import xz_bits_per_byte
from penstock.train.run import CONFIG, SUMMARY, Run

#: Tokens of a held-out document that a completion continues.
PROMPT_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class Completion:
    """A held-out document's beginning and what the model made of it."""

    name: str
    prompt: str
    completion: str

    def __str__(self) -> str:
        lines = f"{self.prompt}\N{PILCROW SIGN}{self.completion}".rstrip()
        return f"--- {self.name} (the model's part begins at \N{PILCROW SIGN})\n{lines}\n"


def clear(folder: Path) -> None:
    """Removes the run that ``folder`` holds.

    Raises:
        UsageError: it holds something else, or another process is training in it.
    """
    if not folder.exists():
        return
    if folder.is_dir():
        with claim(folder):
            sweep(folder)
            if (folder / CONFIG).is_file() or not any(folder.iterdir()):
                with explain_os_errors(f"cannot empty {folder}"):
                    shutil.rmtree(folder)
                return
    raise UsageError(f"{folder} exists and is not a run", hint="Choose another folder with --out.")


def compare_with_xz(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Adds what ``xz -9`` needs for the held-out documents to the summary, on disk too."""
    held_out = run.store.split("held_out")
    tokenizer = run.store.tokenizer
    texts = [tokenizer.decode(held_out.document(i).tolist()).encode() for i in range(held_out.documents)]
    summary = {**summary, "xz_bits_per_byte": xz_bits_per_byte(texts)}
    write_json(run.folder / SUMMARY, summary)
    return summary


def completions(run: Path, held_out: Split, count: int) -> Iterator[Completion]:
    """Completions of ``count`` held-out documents, each cut in its middle, by the finished model of ``run``."""
    model, tokenizer = hub.load(run).eval(), hub.load_tokenizer(run)
    long_enough = [i for i in range(held_out.documents) if len(held_out.document(i)) > 4 * PROMPT_TOKENS]
    for number in long_enough[:count]:
        tokens = held_out.document(number)
        middle = len(tokens) // 2
        prompt = tokenizer.decode(tokens[middle : middle + PROMPT_TOKENS].tolist())
        sampling = Sampling(temperature=0.6, top_p=0.9, max_tokens=80, seed=number)
        yield Completion(held_out.name(number), prompt, "".join(stream_text(model, tokenizer, prompt, sampling)))
