"""The training loop: batches, updates, what is reported of them, and when the run is validated, saved and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from penstock.core.devices import peak_flops
from penstock.core.errors import PenstockError
from penstock.core.metrics import MetricsLog
from penstock.core.signals import StopRequest
from penstock.core.trackers import Tracker, WeightsAndBiases
from penstock.data.loader import Batch, Batches
from penstock.models.beside import Beside
from penstock.parallel.world import World
from penstock.train import checkpoint, folders
from penstock.train.compiling import compile_loss, eager_seconds, obstacle
from penstock.train.config import TrainConfig
from penstock.train.folders import Exported, Trained
from penstock.train.guard import require_finite
from penstock.train.length import Length, updates
from penstock.train.machine import fast_precision, worth_compiling
from penstock.train.order import carry_on
from penstock.train.pipeline.pipeline import Pipeline
from penstock.train.precision import Precision, Weights
from penstock.train.report import Position, Reading, Report
from penstock.train.resuming import description_of, groups_of, restore, resume_command, state_of
from penstock.train.saving import Saver
from penstock.train.shards.shards import Shards
from penstock.train.update import Updater, explain_memory
from penstock.train.validation import Validation


class Trainer:
    """Trains ``model`` as ``config`` says, below the run folder ``folder``.

    Everything that decides the next update is in the configuration, the weights, the optimizer's state and
    :attr:`position`; so a resumed run continues bit for bit (on the same machine and software, and with ``steps``
    rather than ``minutes``, which follow the clock).

    Args:
        config: the run's configuration; what it leaves to the machine is chosen here, and when compiling.
        model: on its device, fp32; cast here as the precision says.
        loader: rows of ``config.batch.length`` tokens.
        tokenizer: the folder with its tokenizer and what else lies beside the weights, copied into every checkpoint.
        folder: the run folder.
        world: this process's place among those of the run.
        pipeline: where processes hold parts of the model, of which ``model`` is this one's.
        shards: where they hold rows of its parameters.

    Raises:
        ModelError: no checkpoint could hold the model.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Trained,
        loader: Batches,
        tokenizer: Path,
        folder: Path,
        world: World | None = None,
        pipeline: Pipeline | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.config, self.model, self.loader, self.folder = config, model, loader, folder
        self.world, self.pipeline, self.shards = world or World(), pipeline, shards
        self.device = next(model.parameters()).device
        folders.check(model)
        self.rows = config.batch.tokens // config.batch.length
        self.length = Length(updates(config, loader.samples if config.epochs else 0), config.minutes)
        self.weights = Weights(model, self._precision())
        self.updater = Updater(self.config, model, self.weights, self.world, pipeline, shards)
        self.order_note = ""  # what the user should know of how the run goes on
        self.validation: Validation | None = None  # of the run, which has the held-out documents
        self._resume = resume_command(folder)
        self._saver = Saver(self.checkpoints, tokenizer, config.checkpoint_background, self._resume)
        self._saved: int | None = None
        self._votes: Callable[[], list[float]] = lambda: [0.0, 0.0, self.position.seconds]
        self._clock = 0.0

    # What the configuration leaves to the machine.

    def _precision(self) -> Precision:
        precision = self.config.precision
        if precision != "auto":
            return precision
        answer = fast_precision(self.device, self.world)
        self._choose("precision", answer.choice, answer.reason)
        return answer.choice

    def _choose(self, key: str, value: object, reason: str) -> None:
        """Puts a choice into the configuration, with its reason; run.json and checkpoints keep both."""
        self.config = self.config.model_copy(update={key: value})
        self.note(key, f"{str(value).lower()}: {reason}")

    def note(self, key: str, choice: str) -> None:
        """Adds a choice and its reason to those that are written down."""
        self.config = self.config.model_copy(update={"chosen": {**self.config.chosen, key: choice}})

    def choose_compile(self) -> None:
        """Whether to compile, where the configuration leaves that open: by how long the run will take without."""
        if self.config.compile != "auto":
            return
        if why := obstacle(self.updater):
            self._choose("compile", False, why)
            return
        seconds = self.world.largest(self.length.seconds_left(self.position, self.eager_seconds))[0]
        answer = worth_compiling(self.device, self.weights.precision, seconds)
        self._choose("compile", answer.choice, answer.reason)

    def eager_seconds(self) -> float:
        """How long the passes of an update take without compiling."""
        return eager_seconds(self.updater, self.loader.batch(0, self.rows), self.config.batch.length_at(self.progress))

    def compile(self) -> str:
        """Compiles the loss for every shape that the run will use, so that no step waits for it.

        Returns:
            Why the run goes on without compiling although its configuration asks for it, or nothing.
        """
        self.choose_compile()
        if not self.config.compile:
            return ""
        why = obstacle(self.updater)
        if not why:
            began, lengths = time.monotonic(), {stage.length for stage in self.config.batch.stages}
            why = compile_loss(self.updater, self.loader.batch(0, self.rows), lengths)
            self.length.compiling = time.monotonic() - began
        self.world.barrier()  # which waits longer for a slow compiler than a pipeline would
        return why

    # The run.

    @property
    def position(self) -> Position:
        """How far the run is."""
        return self.updater.position

    @property
    def parameters(self) -> int:
        """Parameters of the model, all parts of it."""
        parts = self.pipeline or self.shards
        return parts.parameters if parts else self.model.parameter_count()

    @property
    def progress(self) -> float:
        """The part of the run that is done, 0 to 1."""
        return self.length.progress(self.position.step, self.position.seconds)

    def train(self, on_step: Callable[[Report], None] = lambda report: None) -> bool:
        """Trains to the end, or until Ctrl-C or SIGTERM. Saves a checkpoint either way.

        Args:
            on_step: told of every update, in the leading process.

        Returns:
            Whether the run is complete.

        Raises:
            PenstockError: the loss or its gradient is not finite any more, memory is short, a checkpoint cannot be
                written, or another process has failed. The checkpoints written before stay.
        """
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            # Where another process is lost, this one ends without waiting for threads.
            stack.callback(self._saver.settle)
            stack.enter_context(self._leaving())
            batches = stack.enter_context(contextlib.closing(self.loader.prefetch(self.position.samples, self.rows)))
            log: MetricsLog | None = None
            if self.world.leads:
                log = stack.enter_context(contextlib.closing(self._open_log()))
            unread: deque[Reading] = deque()
            self._clock = saved = time.monotonic()
            stopped = False
            while self.progress < 1.0 and not stopped:
                unread.append(self._step(next(batches)))
                validate = self.validation is not None and self.validation.due(self.position.step)
                self._report(unread, 0 if validate else self._behind, log, on_step)
                improved = validate and self._validate(log)
                stopped, due = self._agree(stop.wanted, saved)
                if due or improved or stopped or self.progress >= 1.0:
                    self._report(unread, 0, log, on_step)
                    self.save()
                    self._clock = saved = time.monotonic()
            self._saver.wait()
            self.world.barrier()
        return self.progress >= 1.0

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """Where a failure in the ``with`` block ends the run, a pipeline may leave what it needs to go on."""
        try:
            yield
        except PenstockError:
            if self.pipeline:
                position, groups = dataclasses.asdict(self.position), groups_of(self.updater)
                with contextlib.suppress(PenstockError):  # the failure is what has to be told
                    self.pipeline.leave(position, description_of(self.config), groups)
            raise

    def _open_log(self) -> MetricsLog:
        trackers: list[Tracker] = []
        if self.config.wandb is not None:
            trackers.append(WeightsAndBiases(self.folder, self.config.wandb, self.config.model_dump(mode="json")))
        return MetricsLog(self.folder, self.position.step, trackers)

    def _step(self, batch: Batch) -> Reading:
        length = self.config.batch.length_at(self.progress)
        factor = self.config.schedule.factor(self.position.step, self.length.total_steps(self.position))
        with explain_memory(self.device), self._exchanging():
            measured = self.update(batch, length, factor)
        self.position.step += 1
        self.position.samples += self.rows
        self.position.tokens += self.config.batch.tokens
        return Reading(self.position.step, factor, length, measured)

    def _exchanging(self) -> contextlib.AbstractContextManager[None]:
        """Where shards are exchanged in the block, and one that has them is lost, the error names it."""
        return self.world.blaming() if self.shards else contextlib.nullcontext()

    def update(self, batch: Batch, length: int, factor: float) -> dict[str, Tensor]:
        """Makes one update; see :meth:`~penstock.train.update.Updater.update`."""
        return self.updater.update(batch, length, factor)

    @property
    def _behind(self) -> int:
        """How many updates are read only while later ones are under way, which keeps the device busy.

        None where the clock says what the next update is, and where nothing runs by itself.
        """
        if self.updater.settles_later:
            return 1
        return 0 if self.config.minutes or self.device.type == "cpu" else 1

    def _report(
        self, unread: deque[Reading], left: int, log: MetricsLog | None, on_step: Callable[[Report], None]
    ) -> None:
        """Waits for updates until ``left`` are unread, counts their time, and passes on what they measured."""
        while len(unread) > left:
            if len(unread) == 1:
                self.updater.settle()  # the newest update, which nothing after it has settled
            report = self._read(unread.popleft())
            if log is not None:
                log.write(report.step, report.record())
                on_step(report)

    def _read(self, reading: Reading) -> Report:
        loss, grad_norm, grad_l1 = reading.wait()
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self.position.seconds += seconds
        if not reading.skipped:
            require_finite(loss, "the loss", reading.step, self._resume)
            require_finite(grad_norm, "the gradient's norm", reading.step, self._resume)
        speed = self.config.batch.tokens / max(seconds, 1e-9)
        flops = 3 * self.model.config.flops_per_token(reading.length) * speed
        peak = peak_flops(self.device)
        return Report(
            step=reading.step,
            progress=self.length.progress(reading.step, self.position.seconds),
            loss=loss,
            grad_norm=grad_norm,
            grad_l1=grad_l1,
            lr_factor=reading.lr_factor,
            length=reading.length,
            tokens_per_s=speed,
            flops_per_s=flops,
            mfu=None if peak is None else flops / (peak * self.world.size),
            skipped=reading.skipped,
        )

    def _validate(self, log: MetricsLog | None) -> bool:
        """Validates the weights; whether they are the best so far, and to be kept."""
        whole = self.whole()
        assert self.validation is not None and not isinstance(whole, Beside)  # the configuration refuses it for heads
        with self.shards.measured() if self.shards else contextlib.nullcontext():
            measured = self.validation.measure(whole, self.weights, self.device)
        if log is not None:
            log.write(self.position.step, {f"validation_{self.validation.material.measure}": measured})
        self._clock = time.monotonic()  # validation is no part of the time in steps
        if self.position.best is not None and measured >= self.position.best:
            return False
        self.position.best, self.position.best_step = measured, self.position.step
        return self.validation.config.keep_best

    def _agree(self, stop: bool, saved: float) -> tuple[bool, bool]:
        """Whether any process wants to stop, and whether a checkpoint is due; all take the leader's clock.

        With post-validation none waits for the others: what they wanted an update ago counts.
        """
        by_step = self.config.checkpoint_steps and self.position.step % self.config.checkpoint_steps == 0
        by_time = time.monotonic() - saved > 60 * self.config.checkpoint_minutes
        seconds = self.position.seconds if self.world.leads else 0.0
        asked = self.world.begin_largest(stop, by_time, seconds)
        if self.updater.settles_later:
            asked, self._votes = self._votes, asked
        stopped, due, self.position.seconds = asked()
        return bool(stopped), bool(due or by_step)

    # Checkpoints.

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def save(self) -> None:
        """Writes a checkpoint (in the leading process), unless this step has one.

        Raises:
            PenstockError: the weights are not finite.
            CheckpointError: the disk is full or not writable.
        """
        if self.position.step == self._saved:
            return
        with self._exchanging():
            size = self.updater.norm(self.weights.masters).item()
        require_finite(size, "the norm of the weights", self.position.step, self._resume)
        config, best = self.config, self.position.best_step if self.config.validation.keep_best else None
        keeping = checkpoint.Keeping(config.keep_checkpoints, config.keep_every, best)
        if self.shards:
            self._save_shards(self.shards, keeping)
        else:
            model, state = self.whole(), state_of(self.updater, self.config)
            if model is not None:
                exported: Exported = model
                if not isinstance(model, Beside):
                    exported = self.config.tuner.exported(model, str(self.config.start_from))
                self._saver.save(self.position.step, exported, state, keeping)
        self._saved = self.position.step
        self.world.barrier()

    def _save_shards(self, shards: Shards, keeping: checkpoint.Keeping) -> None:
        self._saver.wait()  # its copies are let go of before there are new ones
        folder, tokenizer, step = self._saver.folder, self._saver.tokenizer, self.position.step
        with self._exchanging():
            state = state_of(self.updater, self.config)
            write = shards.checkpoint(folder, step, tokenizer, state, keeping, self.weights.dtype)
        self._saver.run(step, write)

    def whole(self) -> Trained | None:
        """The model where it can be computed with: in the leading process, None in the others; where it is in shards,
        in all processes, which compute it together. All of them call this."""
        if self.pipeline:
            return self.pipeline.whole()
        return self.model if self.world.leads or self.shards else None

    def resume(self, folder: Path) -> None:
        """Continues from a verified checkpoint.

        Raises:
            ModelError: it is of another model.
            CheckpointError: it was written with another kind of optimizer, or lacks state that is needed now.
        """
        state = checkpoint.load_state(folder)
        restore(self.updater, folder, state, self.config)
        self.position.samples, self.order_note = carry_on(
            self.position.samples, state.description["config"], self.config
        )
        if folder.parent == self.checkpoints:
            self._saved = self.position.step

    def use_average(self) -> None:
        """Puts the averaged weights into the model, for evaluation and export; training is over then."""
        self.updater.use_average()
