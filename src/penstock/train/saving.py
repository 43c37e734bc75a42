"""When a checkpoint is written, in the run's own time or beside it.

In the background, the weights and the trainer's state are copied first, into main memory, so that what is written is of
one moment, however long the disk takes. One checkpoint is written at a time: the next one waits for it. A process that
ends waits too; one that is killed leaves the checkpoint before.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from penstock.core.errors import CheckpointError, PenstockError
from penstock.models.adapters.peft import Adapter
from penstock.models.beside import Beside
from penstock.models.blank import assembled
from penstock.parallel.watch import LossError
from penstock.train import checkpoint
from penstock.train.checkpoint import Keeping, TrainerState
from penstock.train.folders import Exported


class Saver:
    """Writes checkpoints into ``folder``.

    Args:
        folder: the run's folder of checkpoints.
        tokenizer: the folder with what lies beside the weights.
        background: beside the run.
        resume: the command that goes on with the run, for messages.
    """

    def __init__(self, folder: Path, tokenizer: Path, background: bool, resume: str) -> None:
        self.folder, self.tokenizer, self._resume = folder, tokenizer, resume
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="penstock-checkpoint") if background else None
        self._pending: Future[None] | None = None

    def save(self, step: int, model: Exported, state: TrainerState, keeping: Keeping) -> None:
        """Writes the checkpoint of ``step``, or begins to.

        Raises:
            CheckpointError: this one, or the one before that was under way, cannot be written.
        """
        if self._pool is not None:
            self.wait()
            if isinstance(model, Adapter):
                model = model.copied()
            else:
                weights = {name: copied(p) for name, p in model.named_parameters()}
                model = model.holding(weights) if isinstance(model, Beside) else assembled(model, weights)
            tensors = {group: {name: copied(t) for name, t in named.items()} for group, named in state.tensors.items()}
            state = TrainerState(copy.deepcopy(state.position), state.description, tensors)
        save = functools.partial(checkpoint.save, self.folder, step, model, self.tokenizer, state, keeping=keeping)
        self.run(step, save)

    def run(self, step: int, write: Callable[[], object]) -> None:
        """Runs ``write``, which writes the checkpoint of ``step`` from what nothing else changes, or begins to.

        Raises:
            CheckpointError: as :meth:`save` raises it.
        """
        if self._pool is None:
            self._explained(step, write)
        else:
            self.wait()
            self._pending = self._pool.submit(self._explained, step, write)

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            CheckpointError: what was being written cannot be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self) -> None:
        """Returns when nothing is being written any more, whatever came of it: for a run that fails already."""
        with contextlib.suppress(Exception):
            self.wait()

    def _explained(self, step: int, write: Callable[[], object]) -> None:
        try:
            write()
        except LossError:
            raise
        except PenstockError as error:
            raise CheckpointError(
                f"no checkpoint could be saved at step {step}: {error.what}",
                hint="Those before it are intact. Remedy that, free some space perhaps, and continue with: "
                f"{self._resume}",
            ) from error


def copied(tensor: Tensor) -> Tensor:
    """A copy in main memory, which nothing else changes."""
    here = tensor.detach()
    return here.clone() if here.device.type == "cpu" else here.cpu()
