"""The parts of ``penstock demo`` that are not training: its size and time, the comparison with xz, the completions."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from penstock.core.errors import UsageError
from penstock.core.files import claim, explain_os_errors, sweep, write_json
from penstock.core.progress import Reporter
from penstock.models import hub
from penstock.models.config import DecoderConfig
from penstock.models.sampling import Sampling
from penstock.models.text import stream_text
from penstock.train.config import TrainConfig
from penstock.train.evaluate import Sample, xz_bits_per_byte
from penstock.train.material.texts import Texts
from penstock.train.run import CONFIG, SUMMARY, Run
from penstock.train.session import choose_threads

#: Tokens of a held-out document that a completion continues.
PROMPT_TOKENS = 48

#: Shares of the demo's time: for the evaluation, and for what comes after it; and what training gets at least.
EVALUATION, COMPLETIONS, TRAINING = 0.08, 0.08, 0.25

#: Hidden size and layers of the models that the demo chooses from. The smallest is good for any machine: fewer layers
#: or a smaller hidden size learn less even where time is shortest.
SIZES = ((128, 2), (128, 3), (128, 4), (192, 5), (256, 6))

#: Tokens for each parameter that a size must see to be better than a smaller one that sees more: with one or less it
#: loses to the size below, with two and a half it wins (held-out bits per byte in runs of 0.2 to 4 million tokens).
TOKENS_PER_PARAMETER = 2.0


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


def begin(config: TrainConfig, folder: Path, end: float, report: Reporter) -> Run:
    """A run in ``folder`` whose size and minutes are such that the demo ends at ``end`` on this machine.

    Args:
        config: the preset's.
        folder: of the run.
        end: on the clock ``time.monotonic``.
        report: shows the progress of building the store.
    """
    whole = end - time.monotonic()
    run = Run.create(config, folder, report=report)
    choose_threads(run)
    seconds = max(end - time.monotonic() - (EVALUATION + COMPLETIONS) * whole, TRAINING * whole)
    shape, length = run.trainer.model.config, config.batch.length
    flops_per_s = 3 * shape.flops_per_token(length) * config.batch.tokens / run.trainer.eager_seconds()
    chosen = _size(shape, length, flops_per_s * seconds)
    run.write_config()
    overrides = [f"model.{key}={value}" for key, value in chosen.items()]
    return Run.reopen(folder, overrides=[*overrides, f"minutes={seconds / 60:.3f}"], report=report)


def _size(shape: DecoderConfig, length: int, flops: float) -> dict[str, int]:
    """The largest of :data:`SIZES` that sees enough tokens in ``flops`` of training, else the smallest."""
    chosen: dict[str, int] = {}
    for hidden, layers in SIZES:
        heads = hidden // shape.head_dim
        wanted = {
            "hidden": hidden,
            "layers": layers,
            "heads": heads,
            "kv_heads": heads,
            "ffn": hidden * 8 // 3 // 64 * 64,
        }
        model = shape.model_copy(update=wanted)
        tokens = flops / (3 * model.flops_per_token(length))
        if not chosen or tokens >= TOKENS_PER_PARAMETER * model.stored_parameters():
            chosen = wanted
    return chosen


def compare_with_xz(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Adds what ``xz -9`` needs for the evaluated documents to the summary, on disk too."""
    texts = texts_of(run)
    documents, tokenizer = texts.evaluated, texts.store.tokenizer
    written = [tokenizer.decode(documents.document(i).tolist()).encode() for i in range(documents.documents)]
    summary = {**summary, "xz_bits_per_byte": xz_bits_per_byte(written)}
    write_json(run.folder / SUMMARY, summary)
    return summary


def texts_of(run: Run) -> Texts:
    """What the run of the demo is trained on."""
    assert isinstance(run.material, Texts)
    return run.material


def completions(run: Path, documents: Sample, count: int, end: float) -> Iterator[Completion]:
    """Completions of up to ``count`` held-out documents, each cut in its middle, by the finished model of ``run``.

    One is always made; no other is begun after ``end`` on the clock ``time.monotonic``.
    """
    model, tokenizer = hub.load(run, dtype=torch.float32).eval(), hub.load_tokenizer(run)
    split = documents.split
    long_enough = [i for i in range(split.documents) if len(split.document(i)) > 4 * PROMPT_TOKENS]
    for made, number in enumerate(long_enough[:count]):
        if made and time.monotonic() > end:
            return
        tokens = split.document(number)
        middle = len(tokens) // 2
        prompt = tokenizer.decode(tokens[middle : middle + PROMPT_TOKENS].tolist())
        sampling = Sampling(temperature=0.6, top_p=0.9, max_tokens=80, seed=number)
        yield Completion(split.name(number), prompt, "".join(stream_text(model, tokenizer, prompt, sampling)))
