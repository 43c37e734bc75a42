"""What the model at the beginning of a run finds probable: computed once, so that no second model is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from penstock.core.errors import DataError
from penstock.core.files import atomic_folder
from penstock.core.progress import Reporter
from penstock.data.chats.examples import Examples, ExampleStore
from penstock.data.chats.packing import PackedLoader
from penstock.data.manifest import SPLITS, SplitName, map_file
from penstock.data.samplers.sequential import Sequential
from penstock.models.decoder import Decoder
from penstock.train.batches import microbatches
from penstock.train.config import BatchConfig
from penstock.train.objectives.preference import by_sequence, log_probabilities

#: Tokens whose logits exist at a time.
CHUNK = 2048


#: The log-probability of what is learnt of each sequence, by splits; NaN for sequences that stand in no row.
Reference = dict[SplitName, npt.NDArray[np.float32]]


def compute(model: Decoder, store: ExampleStore, batch: BatchConfig, report: Reporter) -> Reference:
    """What ``model`` finds probable of the sequences of ``store``."""
    return {name: _of_split(model, store.split(name), batch, report) for name in SPLITS}


def write(found: Reference, folder: Path) -> None:
    """Writes what :func:`compute` has found into the new ``folder``, a file of float32 a split."""
    with atomic_folder(folder) as partial:
        for name, values in found.items():
            (partial / f"{name}.bin").write_bytes(values.astype("<f4").tobytes())


@torch.no_grad()
def _of_split(model: Decoder, examples: Examples, batch: BatchConfig, report: Reporter) -> npt.NDArray[np.float32]:
    found = np.full(examples.count * examples.width, np.nan, np.float32)
    if not examples.count:
        return found
    loader = PackedLoader(examples, length=batch.length, sampler=Sequential(), seed=0)
    device = model.like.device
    with report("reference", loader.samples, "row") as bar:
        for row in range(loader.samples):
            for micro, context in microbatches(loader.batch(row, 1), batch.length, None, device):
                hidden = model(micro.tokens, context).hidden
                sums = by_sequence(micro, log_probabilities(model, hidden, micro, CHUNK))[0].cpu().numpy()
            sequences = [s for example in loader.packed.rows[row].tolist() for s in examples.sequences(example)]
            found[sequences] = sums[: len(sequences)]
            bar.advance(1)
    return found


def read(examples: Examples, folder: Path, name: SplitName, length: int) -> npt.NDArray[np.float32]:
    """What :func:`write` has written of a split.

    Raises:
        DataError: it is not there, or of rows of another length.
    """
    path = folder / f"{name}.bin"
    found = map_file(path, "<f4") if path.is_file() else np.empty(0, np.float32)
    if (
        len(found) != examples.count * examples.width
        or np.isnan(found[np.repeat(examples.sizes() <= length, examples.width)]).any()
    ):
        raise DataError(
            f"{path} does not hold the log-probabilities of the model at the beginning of the run for these rows",
            hint="Start a new run: they cannot be computed from a model that was trained since.",
        )
    return found
